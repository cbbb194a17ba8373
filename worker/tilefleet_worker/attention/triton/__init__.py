"""Tiled attention in Triton over the paged KV pool: ROCm and CUDA from one source."""
