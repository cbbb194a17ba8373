"""SwiGLU (Shazeer, 2020): silu(gate) · up, both halves of one matrix product's result."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    """Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < inner
    gate = tl.load(gate_up_ptr + row * 2 * inner + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * inner + inner + column, mask=ok, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * inner + column, out.to(out_ptr.dtype.element_ty), mask=ok)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = silu(gate_up[:, :inner]) · gate_up[:, inner:].

    gate_up: [rows, 2 · inner], out: [rows, inner], both contiguous. Computed in fp32. Returns out.
    """
    rows, inner = out.shape
    swiglu_kernel[(rows, triton.cdiv(inner, _BLOCK))](
        gate_up, out, inner, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return out


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The same from the definition, in fp64."""
    gate, up = gate_up.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up
