"""Which experts compute which tokens, found on the device.

Every size depends on the number of tokens alone, so a captured graph holds the routing. Each
expert's pairs of a token and a rank are padded to whole blocks of rows (the aligned-block method of
MegaBlocks, arXiv 2211.15841); blocks that nobody needs are marked.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tilefleet_worker.kernels.weight_tiles import k_constants, weight_tile
from tilefleet_worker.target import compute_type

_CHUNK = 1024
SMALL_ROWS, LARGE_ROWS = 16, 64
"""Pairs of a block."""


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    x_ptr, router_ptr, weight_ptr, chosen_ptr, tokens,
    K: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    EXPERTS: tl.constexpr, PAD: tl.constexpr, TOP: tl.constexpr, TOP_PAD: tl.constexpr,
    NORMALIZED: tl.constexpr, ROWS: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Shares of the best experts of ROWS tokens, best first; of equal ones the lower number."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < tokens
    expert = tl.arange(0, PAD)
    acc = tl.zeros([PAD, ROWS], tl.float32)
    for at in range(0, K, BLOCK_K):
        acc = weight_tile(
            acc, router_ptr, expert * K, expert < EXPERTS, router_ptr, expert,
            x_ptr, row.to(tl.int64) * K, ok, at, K, SCALE_K, BLOCK_K, EVEN, CT,
        )  # fmt: skip
    logits = tl.where((expert < EXPERTS)[:, None], acc, -float("inf"))
    shares = tl.exp(logits - tl.max(logits, 0)[None, :])
    shares = shares / tl.sum(shares, 0)[None, :]
    rank = tl.arange(0, TOP_PAD)
    weights = tl.zeros([TOP_PAD, ROWS], tl.float32)
    for place in tl.static_range(TOP):
        best = tl.max(shares, 0)
        which = tl.min(tl.where(shares == best[None, :], expert[:, None], EXPERTS - 1), 0)
        tl.store(chosen_ptr + row * TOP + place, which, mask=ok)  # NaN shares: the last expert
        weights = tl.where((rank == place)[:, None], best[None, :], weights)
        shares = tl.where(expert[:, None] == which[None, :], -1.0, shares)
    if NORMALIZED:
        weights = weights / tl.sum(weights, 0)[None, :]
    where = row[None, :] * TOP + rank[:, None]
    tl.store(weight_ptr + where, weights, mask=ok[None, :] & (rank < TOP)[:, None])


@triton.jit(do_not_specialize=["pairs", "blocks"])
def sort_kernel(
    chosen_ptr, pair_ptr, expert_ptr, pairs, blocks,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: (experts). Each program places its expert's pairs in their order, after the blocks of
    the experts before it; -1 fills the last block, and marks the blocks that nobody needs.
    """
    expert = tl.program_id(0)
    lane, bins = tl.arange(0, CHUNK), tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for at in range(0, pairs, CHUNK):
        chosen = tl.load(chosen_ptr + at + lane, mask=at + lane < pairs, other=EXPERTS)
        counts += tl.histogram(chosen, BINS)
    needed = tl.where(bins < EXPERTS, (counts + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(bins < expert, needed, 0), 0)
    mine = tl.sum(tl.where(bins == expert, needed, 0), 0)
    place = first * ROWS
    for at in range(0, pairs, CHUNK):
        chosen = tl.load(chosen_ptr + at + lane, mask=at + lane < pairs, other=EXPERTS)
        hit = (chosen == expert).to(tl.int32)
        tl.store(pair_ptr + place + tl.cumsum(hit, 0) - 1, at + lane, mask=hit > 0)
        place += tl.sum(hit, 0)
    pad = place + tl.arange(0, ROWS)
    tl.store(pair_ptr + pad, tl.full([ROWS], -1, tl.int32), mask=pad < (first + mine) * ROWS)
    for at in range(0, mine, CHUNK):
        owner = tl.full([CHUNK], 0, tl.int32) + expert
        tl.store(expert_ptr + first + at + lane, owner, mask=at + lane < mine)
    if expert == EXPERTS - 1:
        for at in range(first + mine, blocks, CHUNK):
            nobody = tl.full([CHUNK], -1, tl.int32)
            tl.store(expert_ptr + at + lane, nobody, mask=at + lane < blocks)


@dataclass(frozen=True, slots=True)
class Router:
    """How one layer chooses."""

    weight: torch.Tensor  # [experts, hidden]
    chosen: int
    """Experts of a token."""
    normalized: bool
    """Whether a token's shares sum to 1; else they are its shares among all experts."""


class RoutingSpace:
    """Where a routing lies, for up to max_tokens tokens."""

    def __init__(self, experts: int, chosen: int, max_tokens: int, device: torch.device) -> None:
        pairs = max_tokens * chosen
        small, large = (num_blocks(pairs, experts, rows) for rows in (SMALL_ROWS, LARGE_ROWS))

        def ints(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        self.shares = torch.empty(pairs, dtype=torch.float32, device=device)  # token by token
        self.chosen = ints(pairs)
        self.pairs = ints(max(small * SMALL_ROWS, large * LARGE_ROWS))  # -1: padding
        self.experts = ints(small)  # of each block; -1: nobody


def num_blocks(pairs: int, experts: int, rows: int) -> int:
    """Blocks that any choice of so many pairs can need: each used expert leaves one unfilled."""
    used = min(pairs, experts)
    return used + (pairs - used) // rows


def block_rows(pairs: int, experts: int) -> int:
    """Pairs of a block: more once an expert has that many of them on average."""
    return LARGE_ROWS if pairs >= LARGE_ROWS * experts else SMALL_ROWS


def route(x: torch.Tensor, router: Router, space: RoutingSpace) -> tuple[int, int]:
    """Fill `space` for x [tokens, hidden], contiguous. Returns rows of a block and blocks."""
    experts, pairs = len(router.weight), len(x) * router.chosen
    rows = block_rows(pairs, experts)
    blocks = num_blocks(pairs, experts, rows)
    route_kernel[(triton.cdiv(len(x), SMALL_ROWS),)](
        x, router.weight, space.shares, space.chosen, len(x), **k_constants(router.weight),
        EXPERTS=experts, PAD=max(16, triton.next_power_of_2(experts)), TOP=router.chosen,
        TOP_PAD=triton.next_power_of_2(router.chosen), NORMALIZED=router.normalized,
        ROWS=SMALL_ROWS, CT=compute_type(x.dtype), num_warps=8, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    sort_kernel[(experts,)](
        space.chosen, space.pairs, space.experts, pairs, blocks, EXPERTS=experts,
        BINS=triton.next_power_of_2(experts + 1), ROWS=rows, CHUNK=_CHUNK,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return rows, blocks


def route_reference(x: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares and experts [tokens, chosen] from the definition, in fp64."""
    shares = (x.double() @ router.weight.double().t()).softmax(-1)
    best, chosen = shares.topk(router.chosen, -1)
    return best / best.sum(-1, keepdim=True) if router.normalized else best, chosen
