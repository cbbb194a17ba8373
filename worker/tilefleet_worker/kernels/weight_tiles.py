"""The inner loop of products of our own: rows of a weight times rows of activations, over K.

Weights are the first operand: converted ones come from registers, which the matrix units of every
target take there, and a tile of 16 weight rows is enough to fill an instruction with one token. The
order of additions depends on K alone, so a result has the same bits whatever else is in the tile.
Stored weights (fp8, int8) are exact in bf16 and fp16; the scale multiplies the fp32 sum of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tilefleet_worker.kernels.scaled_matrix import ScaledMatrix

Matrix = torch.Tensor | ScaledMatrix
"""[rows, columns], or [experts, rows, columns]."""


@triton.jit
def weight_tile(
    acc, weight_ptr, weight_row, weight_ok, scale_ptr, scale_row, x_ptr, x_row, x_ok,
    at, K: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """acc + the product of columns at … at + BLOCK_K. acc: fp32 [weight rows, x rows].

    weight_row, x_row: offsets of the rows' first elements. SCALE_K: columns of a scale's block; K
    or more: the caller multiplies at the end.
    """
    k = at + tl.arange(0, BLOCK_K)
    weight_mask, x_mask = weight_ok[:, None], x_ok[None, :]
    if not EVEN:
        weight_mask, x_mask = weight_mask & (k < K)[None, :], x_mask & (k < K)[:, None]
    weight = tl.load(weight_ptr + weight_row[:, None] + k[None, :], mask=weight_mask, other=0.0)
    x = tl.load(x_ptr + x_row[None, :] + k[:, None], mask=x_mask, other=0.0)
    if SCALE_K >= K:
        return tl.dot(weight.to(CT), x.to(CT), acc)
    scale = tl.load(scale_ptr + scale_row + at // SCALE_K, mask=weight_ok, other=0.0)
    return acc + tl.dot(weight.to(CT), x.to(CT)) * scale[:, None]


@dataclass(frozen=True, slots=True)
class WeightTile:
    """rows: weight rows of a program. How many columns a step takes is the matrix's alone."""

    rows: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Launch options; fp fusion is pinned: Triton 3.10 changes its default, and so bits."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def k_constants(matrix: Matrix) -> dict[str, Any]:
    """Constants of the loop: columns, those of a scale's block and of a step, and if it divides.

    A step is 128 bytes of a weight's row or less.
    """
    columns = width = matrix.shape[-1]
    step = 64
    if isinstance(matrix, ScaledMatrix):
        width = min(matrix.block[1], columns)
        step = 128 if width >= columns else min(width, 128)
    step = max(16, min(step, triton.next_power_of_2(columns)))
    return {"K": columns, "SCALE_K": width, "BLOCK_K": step, "EVEN": columns % step == 0}


def why_not(width: int, columns: int) -> str:
    """Why the loop cannot take blocks of so many columns; empty when it can.

    A step lies in one block, so that has a power of two of columns from 16 on, or a multiple of
    128, or all.
    """
    power = width >= 16 and width & (width - 1) == 0
    return "" if width >= columns or power or width % 128 == 0 else f"blocks of {width} columns"


def operands(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """Values, scales, rows of a scale's block, and strides of the scales' rows and experts.

    Without scales the values stand in for them, with 0 rows to a block.
    """
    if isinstance(matrix, torch.Tensor):
        return matrix, matrix, 0, 0, 0
    scale = matrix.scale
    per_expert = scale.stride(0) if scale.dim() == 3 else 0
    return matrix.values, scale, matrix.block[0], scale.stride(-2), per_expert


def dense(matrix: Matrix) -> torch.Tensor:
    """The values that a matrix stands for: itself, or fp32."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.dequantized()
