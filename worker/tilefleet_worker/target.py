"""What kernels are made for: the architecture of the device, and the types that it computes in."""

import os
from functools import cache

import torch
import triton
import triton.language as tl


def arch_of(device: torch.device) -> str:
    """gfx942, gfx950, … or sm90; none for a CPU, which stands in for a GPU in tests.

    Of the device meta: what Triton compiles for.
    """
    if device.type == "meta":
        target = triton.runtime.driver.active.get_current_target()
        return f"sm{target.arch}" if target.backend == "cuda" else str(target.arch)
    return _arch_of_gpu(device) if device.type == "cuda" else "none"


@cache
def _arch_of_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Operand type of matrix products: the tensors', but fp32 where Triton's interpreter runs.

    The interpreter treats bf16 arithmetic as arithmetic on its bits (triton 3.9), hence the switch.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


def fp8_type(arch: str) -> torch.dtype | None:
    """Type of the e4m3 codes that kernels decode there; None where they decode none.

    CDNA3 has FNUZ (MI325X too: it is gfx942), what came after it OCP, NVIDIA OCP from sm89 on.
    """
    if arch.startswith("gfx94"):
        return torch.float8_e4m3fnuz
    if arch == "none" or arch.startswith(("gfx95", "gfx12")):
        return torch.float8_e4m3fn
    recent = arch.startswith("sm") and int(arch.removeprefix("sm")) >= 89
    return torch.float8_e4m3fn if recent else None
