"""Peaks of the accelerators, as their makers publish them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device. GB are 10⁹ bytes."""

    name: str
    memory_bytes: float
    bytes_per_second: float
    flops: float
    """Dense bf16 with fp32 sums; weights of fewer bits are computed in bf16 too."""


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        # AMD: ROCm documentation, GPU hardware specifications; compute units · clock · width.
        Accelerator("MI300X", 192e9, 5.3e12, 1.31e15),
        Accelerator("MI325X", 256e9, 6.0e12, 1.31e15),
        Accelerator("MI355X", 288e9, 8.0e12, 2.52e15),
        # NVIDIA: data sheets of the SXM modules, without sparsity.
        Accelerator("H100", 80e9, 3.35e12, 0.989e15),
        Accelerator("H200", 141e9, 4.8e12, 0.989e15),
    )
}
