"""A mixture of experts in five launches: route, sort, gate and up, down, combine.

Grouped products over the blocks of kernels.routing; blocks that nobody needs end at once. No float
is added by atomics: a token's sum has the order of its ranks, and so the same bits whatever its
batch-mates chose.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tilefleet_worker.kernels.routing import (
    SMALL_ROWS,
    Router,
    RoutingSpace,
    route,
    route_reference,
)
from tilefleet_worker.kernels.weight_tiles import (
    Matrix,
    WeightTile,
    dense,
    k_constants,
    operands,
    weight_tile,
)
from tilefleet_worker.target import arch_of, compute_type

_COLUMNS = 1024


@triton.jit(do_not_specialize=["scale_stride", "scale_expert"])
def expert_gate_up_kernel(
    x_ptr, weight_ptr, scale_ptr, pair_ptr, expert_ptr, out_ptr, scale_stride, scale_expert,
    K: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    SCALE_N: tl.constexpr, INNER: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """silu(gate x) · (up x) of one block of pairs. Grid: (tiles of the inner size, blocks)."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_ptr + tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ok = pair >= 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < INNER
    weight_ptr += expert * 2 * INNER * K
    scale_ptr += expert * scale_expert
    gate_scale, up_scale = n * 0, n * 0
    if SCALE_N > 0:
        gate_scale, up_scale = n // SCALE_N * scale_stride, (n + INNER) // SCALE_N * scale_stride
    token = tl.where(ok, pair, 0) // TOP * K
    gate, up = tl.zeros([BLOCK_N, ROWS], tl.float32), tl.zeros([BLOCK_N, ROWS], tl.float32)
    for at in range(0, K, BLOCK_K):
        gate = weight_tile(
            gate, weight_ptr, n * K, n_ok, scale_ptr, gate_scale, x_ptr, token, ok, at,
            K, SCALE_K, BLOCK_K, EVEN, CT,
        )  # fmt: skip
        up = weight_tile(
            up, weight_ptr + INNER * K, n * K, n_ok, scale_ptr, up_scale, x_ptr, token, ok, at,
            K, SCALE_K, BLOCK_K, EVEN, CT,
        )  # fmt: skip
    if (SCALE_N > 0) & (SCALE_K >= K):
        gate *= tl.load(scale_ptr + gate_scale, mask=n_ok, other=0.0)[:, None]
        up *= tl.load(scale_ptr + up_scale, mask=n_ok, other=0.0)[:, None]
    made = gate / (1.0 + tl.exp(-gate)) * up
    where = out_ptr + pair[:, None] * INNER + n[None, :]
    tl.store(where, tl.trans(made).to(out_ptr.dtype.element_ty), mask=ok[:, None] & n_ok[None, :])


@triton.jit(do_not_specialize=["scale_stride", "scale_expert"])
def expert_down_kernel(
    x_ptr, weight_ptr, scale_ptr, pair_ptr, expert_ptr, out_ptr, scale_stride, scale_expert,
    K: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    SCALE_N: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """down x of one block of pairs, to the pair's row. Grid: (tiles of hidden, blocks)."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pair_ptr + tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ok = pair >= 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < HIDDEN
    weight_ptr += expert * HIDDEN * K
    scale_ptr += expert * scale_expert
    scale_row = n * 0
    if SCALE_N > 0:
        scale_row = n // SCALE_N * scale_stride
    row = tl.where(ok, pair, 0) * K
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for at in range(0, K, BLOCK_K):
        acc = weight_tile(
            acc, weight_ptr, n * K, n_ok, scale_ptr, scale_row, x_ptr, row, ok, at,
            K, SCALE_K, BLOCK_K, EVEN, CT,
        )  # fmt: skip
    if (SCALE_N > 0) & (SCALE_K >= K):
        acc *= tl.load(scale_ptr + scale_row, mask=n_ok, other=0.0)[:, None]
    where = out_ptr + pair[:, None] * HIDDEN + n[None, :]
    tl.store(where, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=ok[:, None] & n_ok[None, :])


@triton.jit
def combine_kernel(
    made_ptr, weight_ptr, out_ptr, HIDDEN: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of a token's experts by their shares, in the order of ranks. Grid: (tokens, tiles)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < HIDDEN
    acc = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP):
        share = tl.load(weight_ptr + token * TOP + place)
        made = tl.load(made_ptr + (token * TOP + place) * HIDDEN + column, mask=ok, other=0.0)
        acc += share * made.to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + column, acc.to(out_ptr.dtype.element_ty), mask=ok)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The experts of one layer."""

    router: Router
    gate_up: Matrix  # [experts, 2 · inner, hidden], gates first
    down: Matrix  # [experts, hidden, inner]


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """Sizes of a mixture."""

    experts: int
    chosen: int
    hidden: int
    inner: int


class MixtureSpace:
    """Intermediates of a mixture, for up to max_tokens tokens."""

    def __init__(
        self, shape: MixtureShape, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        pairs = max_tokens * shape.chosen
        self.routing = RoutingSpace(shape.experts, shape.chosen, max_tokens, device)
        self.activated = torch.empty(pairs, shape.inner, dtype=dtype, device=device)
        self.made = torch.empty(pairs, shape.hidden, dtype=dtype, device=device)


def tile_for(arch: str, rows: int) -> WeightTile:
    """Tile of both products by the pairs of a block.

    sm90: swept on an H100 (16 to 64 features, 4 and 8 warps, 3 to 5 stages) with
    benchmarks/gpu_experts.py, the best at 64 and 4,096 tokens in bf16 and fp8. AMD: by compile
    reports, not measured.
    """
    if arch.startswith("gfx"):
        return WeightTile(rows=32 if rows == SMALL_ROWS else 64, warps=4, stages=2)
    return WeightTile(rows=64, warps=4, stages=3)


def mixture(
    x: torch.Tensor, weights: ExpertWeights, space: MixtureSpace, out: torch.Tensor
) -> torch.Tensor:
    """out = sum over a token's best experts of share · down(silu(gate x) · up x).

    x, out: [tokens, hidden], contiguous, of one type. Launches only. Returns out.
    """
    hidden, routing = x.shape[1], space.routing
    rows, blocks = route(x, weights.router, routing)
    _experts(x, weights, space, rows, blocks)
    combine_kernel[(len(x), triton.cdiv(hidden, _COLUMNS))](
        space.made, routing.shares, out, HIDDEN=hidden, TOP=weights.router.chosen, BLOCK=_COLUMNS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _experts(
    x: torch.Tensor, weights: ExpertWeights, space: MixtureSpace, rows: int, blocks: int
) -> None:
    """Both products, from x to space.made."""
    tile, (_, hidden, inner) = tile_for(arch_of(x.device), rows), weights.down.shape
    routing, kind = space.routing, compute_type(x.dtype)
    values, scale, height, stride, per_expert = operands(weights.gate_up)
    expert_gate_up_kernel[(triton.cdiv(inner, tile.rows), blocks)](
        x, values, scale, routing.pairs, routing.experts, space.activated, stride, per_expert,
        **k_constants(weights.gate_up), SCALE_N=height, INNER=inner, TOP=weights.router.chosen,
        ROWS=rows, BLOCK_N=tile.rows, CT=kind, **tile.options(),
    )  # fmt: skip
    values, scale, height, stride, per_expert = operands(weights.down)
    expert_down_kernel[(triton.cdiv(hidden, tile.rows), blocks)](
        space.activated, values, scale, routing.pairs, routing.experts, space.made, stride,
        per_expert, **k_constants(weights.down), SCALE_N=height, HIDDEN=hidden,
        ROWS=rows, BLOCK_N=tile.rows, CT=kind, **tile.options(),
    )  # fmt: skip


def mixture_reference(x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """The same from the definition, in fp64."""
    gate_up, down = dense(weights.gate_up).double(), dense(weights.down).double()
    best, chosen = route_reference(x, weights.router)
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, (row, parts, numbers) in enumerate(zip(x.double(), best, chosen, strict=True)):
        for part, number in zip(parts, numbers.tolist(), strict=True):
            gate, up = (gate_up[number] @ row).chunk(2)
            out[token] += part * (down[number] @ (gate * torch.sigmoid(gate) * up))
    return out
