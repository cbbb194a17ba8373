"""y = x Wᵀ + b with W stored in a byte a weight, decoded in the tile: half the bytes of bf16.

One kernel for any number of rows, so a row's bits do not depend on how many there are.
"""

import torch
import triton
import triton.language as tl

from tilefleet_worker.kernels.scaled_matrix import ScaledMatrix
from tilefleet_worker.kernels.weight_tiles import WeightTile, k_constants, operands, weight_tile
from tilefleet_worker.target import arch_of, compute_type


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def scaled_product_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, rows, scale_stride,
    K: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    SCALE_N: tl.constexpr, FEATURES: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of features, tiles of rows)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n_ok, ok = n < FEATURES, row < rows
    weight_row, scale_row = n.to(tl.int64) * K, n // SCALE_N * scale_stride
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for at in range(0, K, BLOCK_K):
        acc = weight_tile(
            acc, weight_ptr, weight_row, n_ok, scale_ptr, scale_row, x_ptr, row * K, ok, at,
            K, SCALE_K, BLOCK_K, EVEN, CT,
        )  # fmt: skip
    if SCALE_K >= K:
        acc *= tl.load(scale_ptr + scale_row, mask=n_ok, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    where = out_ptr + row[:, None] * FEATURES + n[None, :]
    tl.store(where, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=ok[:, None] & n_ok[None, :])


def tile_for(arch: str, rows: int) -> tuple[int, WeightTile]:
    """Rows of x of a program, and its tile, by all rows of x. AMD: by compile reports alone."""
    amd = arch.startswith("gfx")
    if rows <= 16:
        return 16, WeightTile(rows=16, warps=4, stages=3 if amd else 5)
    if rows <= 64:
        return 64, WeightTile(rows=32, warps=4, stages=2 if amd else 4)
    if amd:
        return 64, WeightTile(rows=128, warps=8, stages=2)
    return 128, WeightTile(rows=128, warps=8, stages=3)


def scaled_product(
    x: torch.Tensor, weight: ScaledMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """out = x weightᵀ + bias. Returns out.

    x: [rows, columns], out: [rows, features], both contiguous. bias: [features].
    """
    rows, tile = tile_for(arch_of(x.device), len(x))
    values, scale, height, stride, _ = operands(weight)
    features = len(values)
    scaled_product_kernel[(triton.cdiv(features, tile.rows), triton.cdiv(len(x), rows))](
        x, values, scale, x if bias is None else bias, out, len(x), stride,
        **k_constants(weight), SCALE_N=height, FEATURES=features, BIAS=bias is not None, ROWS=rows,
        BLOCK_N=tile.rows, CT=compute_type(x.dtype), **tile.options(),
    )  # fmt: skip
    return out
