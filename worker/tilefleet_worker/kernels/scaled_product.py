"""y = x Wᵀ + b with W stored in a byte a weight, decoded in the tile: half the bytes of bf16.

Columns are summed in parts whose size depends on W alone, and the parts in order, so a row's sum
does not depend on how many rows there are. With few rows each part has programs of its own, without
which a narrow W would leave most of the device idle; with many one program sums all parts.
"""

import torch
import triton
import triton.language as tl

from tilefleet_worker.kernels.scaled_matrix import ScaledMatrix
from tilefleet_worker.kernels.weight_tiles import WeightTile, k_constants, operands, weight_tile
from tilefleet_worker.target import arch_of, compute_type

_PROGRAMS = 256
"""Wanted of a product with few rows: about two on each compute unit of the largest devices."""
_FEW_ROWS = 64
_LEAST_COLUMNS = 1024
_COLUMNS = 1024


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def scaled_product_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, rows, scale_stride,
    K: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PART: tl.constexpr, APART: tl.constexpr, SCALE_N: tl.constexpr, FEATURES: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of features, tiles of rows, parts if APART). PART: columns of a part.

    APART: out is fp32 [parts, rows, features], summed by sum_parts_kernel.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n_ok, ok = n < FEATURES, row < rows
    weight_row, scale_row = n.to(tl.int64) * K, n // SCALE_N * scale_stride
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    first, last = 0, K
    if APART:
        first = tl.program_id(2) * PART
        last = tl.minimum(first + PART, K)
    for begin in range(first, last, PART):
        acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for at in range(begin, tl.minimum(begin + PART, K), BLOCK_K):
            acc = weight_tile(
                acc, weight_ptr, weight_row, n_ok, scale_ptr, scale_row, x_ptr, row * K, ok, at,
                K, SCALE_K, BLOCK_K, EVEN, CT,
            )  # fmt: skip
        if SCALE_K >= K:
            acc *= tl.load(scale_ptr + scale_row, mask=n_ok, other=0.0)[:, None]
        total += acc
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    if APART:
        out_ptr += tl.program_id(2).to(tl.int64) * rows * FEATURES
    where = out_ptr + row[:, None] * FEATURES + n[None, :]
    tl.store(where, tl.trans(total).to(out_ptr.dtype.element_ty), mask=ok[:, None] & n_ok[None, :])


@triton.jit(do_not_specialize=["rows"])
def sum_parts_kernel(
    part_ptr, bias_ptr, out_ptr, rows,
    PARTS: tl.constexpr, FEATURES: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, tiles of features)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < FEATURES
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(part_ptr + (part * rows + row) * FEATURES + column, mask=ok, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * FEATURES + column, total.to(out_ptr.dtype.element_ty), mask=ok)


def tile_for(arch: str, rows: int) -> tuple[int, WeightTile]:
    """Rows of x of a program, and its tile, by all rows of x.

    sm90: swept on an H100 as that of kernels.mixture was. AMD: by compile reports, not measured.
    """
    width = 16 if rows <= 16 else 64
    if not arch.startswith("gfx"):
        return width, WeightTile(rows=64, warps=4, stages=3)
    if width < 64:
        return width, WeightTile(rows=16, warps=4, stages=3)
    return width, WeightTile(rows=64, warps=8, stages=2)


def part_of(features: int, columns: int, step: int) -> int:
    """Columns of a part, a multiple of the loop's step: as few parts as fill the device."""
    wanted = max(1, _PROGRAMS // triton.cdiv(features, 64))
    parts = max(1, min(wanted, columns // _LEAST_COLUMNS))
    return int(triton.cdiv(triton.cdiv(columns, parts), step) * step)


def scaled_product(
    x: torch.Tensor, weight: ScaledMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """out = x weightᵀ + bias. Returns out.

    x: [rows, columns], out: [rows, features], both contiguous. bias: [features].
    """
    rows, tile = tile_for(arch_of(x.device), len(x))
    values, scale, height, stride, _ = operands(weight)
    features, columns = values.shape
    constants = k_constants(weight)
    part = part_of(features, columns, constants["BLOCK_K"])
    parts = triton.cdiv(columns, part)
    apart = parts > 1 and len(x) <= _FEW_ROWS
    target = out
    if apart:
        target = torch.empty(parts, *out.shape, dtype=torch.float32, device=x.device)
    biased = bias is not None and not apart
    grid = triton.cdiv(features, tile.rows), triton.cdiv(len(x), rows), parts if apart else 1
    scaled_product_kernel[grid](
        x, values, scale, x if bias is None else bias, target, len(x), stride, **constants,
        PART=part, APART=apart, SCALE_N=height, FEATURES=features, BIAS=biased, ROWS=rows,
        BLOCK_N=tile.rows, CT=compute_type(x.dtype), **tile.options(),
    )  # fmt: skip
    if apart:
        sum_parts_kernel[(len(x), triton.cdiv(features, _COLUMNS))](
            target, x if bias is None else bias, out, len(x), PARTS=parts, FEATURES=features,
            BIAS=bias is not None, BLOCK=_COLUMNS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
