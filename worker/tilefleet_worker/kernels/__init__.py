"""Fused Triton kernels around the matrix products, each beside its reference in plain torch."""
