"""Tiles of keys or values out of a paged cache.

A cache is a pointer, or a TMA descriptor of [blocks · block, kv heads · dim] whose boxes are the tiles
(sm90: one thread asks for a whole tile and no lane computes addresses). A tile starts at a multiple of
its length, so that one page holds it where BLOCK ≥ TILE.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def page_at(table, start, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Page of the tile at `start`, or of the last key before `end` if the tile begins behind it.

    Asked for one tile ahead: the table's latency then hides behind a tile's arithmetic. 0 where a
    tile takes several pages.
    """
    return tl.load(table + tl.minimum(start, end - 1) // BLOCK) if BLOCK >= TILE else 0


@triton.jit
def load_tile(
    cache, table, page, start, first, end, head, stride_block, stride_token, stride_head,
    BLOCK: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows of the keys `start … start + TILE - 1` of a KV head, [TILE, DIM_PAD].

    MASKED: keys outside `first … end - 1` are 0 or, where they share a page with others, whatever
    the page holds: a pool holds finite values only (kv_cache.scrub), so that a weight of 0 hides them.
    """
    t, d = tl.arange(0, TILE), tl.arange(0, DIM_PAD)
    if TMA:
        tile = cache.load([page * BLOCK + start % BLOCK, head * DIM])
    elif BLOCK >= TILE:
        rows = page.to(tl.int64) * stride_block + (start % BLOCK + t) * stride_token
        at = cache + head * stride_head + rows[:, None] + d[None, :]
        ok = None if DIM == DIM_PAD else (d < DIM)[None, :]
        tile = tl.load(at, mask=ok, other=None if DIM == DIM_PAD else 0.0)
    else:
        pos = start + t
        ok = (pos >= first) & (pos < end) if MASKED else pos >= 0
        pages = tl.load(table + pos // BLOCK, mask=ok, other=0).to(tl.int64)
        rows = pages * stride_block + (pos % BLOCK) * stride_token
        at = cache + head * stride_head + rows[:, None] + d[None, :]
        tile = tl.load(at, mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
    return tile


def cache_argument(cache: torch.Tensor, tile: int, use_tma: bool) -> Any:
    """The cache [blocks, block, kv heads, dim] as the kernels take it."""
    return rows_of_heads(cache.flatten(0, 1), tile) if use_tma else cache


def rows_of_heads(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """[tokens, heads, dim] as a descriptor of [tokens, heads · dim]; a box holds rows of one head."""
    tokens, heads, dim = x.shape
    return TensorDescriptor(x, [tokens, heads * dim], [x.stride(0), 1], [rows, dim])


def can_use_tma(cache: torch.Tensor, tile: int) -> bool:
    """Whether boxes are tiles: in one block, of a dimension without padding, in dense memory."""
    block, dim = cache.shape[1], cache.shape[3]
    stride_block, stride_token, stride_head, _ = cache.stride()
    dense = stride_head == dim and stride_block == block * stride_token
    aligned = stride_token * cache.element_size() % 16 == 0
    return block % tile == 0 and dim == triton.next_power_of_2(dim) and dense and aligned
