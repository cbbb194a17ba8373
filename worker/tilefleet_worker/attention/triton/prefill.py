"""Paged variable-length prefill attention: FlashAttention-2 tiles over the KV pool.

A program computes `rows` query tokens of one head against that sequence's whole visible context, so
chunked prefill, mixed batches and fresh prompts are one call: queries are the last `query_len` tokens of
the context. KV tiles start at position 0 and not at the chunk, so chunking changes no bits.

Source: FlashAttention-2 (arXiv 2307.08691). Knows nothing of requests, schedulers or models.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from tilefleet_worker.attention.triton.pages import (
    cache_argument,
    can_use_tma,
    load_tile,
    page_at,
    rows_of_heads,
)
from tilefleet_worker.attention.triton.softmax import LOG2_E, scores, take_sink, take_tile
from tilefleet_worker.attention.triton.tiles import PrefillTile, launch_options
from tilefleet_worker.target import compute_type

Ints = npt.NDArray[np.integer]


@triton.jit(do_not_specialize=["window", "stride_table"])
def paged_prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, tile_ptr, sink_ptr, out_ptr,
    scale_log2, softcap_log2, window,
    stride_q, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_table,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, HAS_SINK: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, TMA: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid: (heads, query tiles); heads vary fastest, so a group's heads share KV through the L2."""
    head, work = tl.program_id(0), tl.program_id(1)
    # tile row: sequence, first query row in q, query rows, position of the first query row
    seq = tl.load(tile_ptr + work * 4)
    row0 = tl.load(tile_ptr + work * 4 + 1)
    count = tl.load(tile_ptr + work * 4 + 2)
    pos0 = tl.load(tile_ptr + work * 4 + 3)
    r, d, t = tl.arange(0, ROWS), tl.arange(0, DIM_PAD), tl.arange(0, TILE)
    own = (r < count)[:, None] & (d < DIM)[None, :]
    q_off = (row0 + r).to(tl.int64)[:, None] * stride_q + head * DIM + d[None, :]
    # by TMA, rows behind `count` are of the next tile, and nothing of them is stored
    q = q_ptr.load([row0, head * DIM]) if TMA else tl.load(q_ptr + q_off, mask=own, other=0.0)
    q = q.to(CT)
    q_pos = pos0 + r
    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    table = table_ptr + seq.to(tl.int64) * stride_table
    kv_head = head // GROUP
    end = pos0 + count
    first = tl.maximum(pos0 - window + 1, 0) if WINDOW else 0
    begin = first // TILE * TILE
    # below `full` every key is visible to every row: no mask, except at a window's lower edge
    full = begin if WINDOW else pos0 // TILE * TILE
    page = page_at(table, begin, end, BLOCK, TILE)
    for start in tl.range(begin, full, TILE):
        next_page = page_at(table, start + TILE, end, BLOCK, TILE)
        k = load_tile(
            k_ptr, table, page, start, first, end, kv_head, stride_kb, stride_kt, stride_kh,
            BLOCK, TILE, DIM, DIM_PAD, False, TMA,
        )  # fmt: skip
        v = load_tile(
            v_ptr, table, page, start, first, end, kv_head, stride_vb, stride_vt, stride_vh,
            BLOCK, TILE, DIM, DIM_PAD, False, TMA,
        )  # fmt: skip
        s = scores(q, k, scale_log2, softcap_log2, SOFTCAP, CT)
        m, total, acc = take_tile(m, total, acc, s, v, False, CT)
        page = next_page
    for start in tl.range(full, end, TILE):
        next_page = page_at(table, start + TILE, end, BLOCK, TILE)
        k = load_tile(
            k_ptr, table, page, start, first, end, kv_head, stride_kb, stride_kt, stride_kh,
            BLOCK, TILE, DIM, DIM_PAD, True, TMA,
        )  # fmt: skip
        v = load_tile(
            v_ptr, table, page, start, first, end, kv_head, stride_vb, stride_vt, stride_vh,
            BLOCK, TILE, DIM, DIM_PAD, True, TMA,
        )  # fmt: skip
        key = start + t
        seen = key[None, :] <= q_pos[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > q_pos[:, None] - window)
        s = tl.where(seen, scores(q, k, scale_log2, softcap_log2, SOFTCAP, CT), -float("inf"))
        m, total, acc = take_tile(m, total, acc, s, v, WINDOW, CT)
        page = next_page
    if HAS_SINK:
        m, total, acc = take_sink(m, total, acc, tl.load(sink_ptr + head))
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + q_off, out, mask=own)


def query_tiles(query_lens: Ints, context_lens: Ints, rows: int, first_row: int = 0) -> Ints:
    """Cut a step's queries into tiles of `rows`, the tile with the longest context first.

    Returns int32 [tiles, 4]: sequence, first query row, rows, position of the first row.

    query_lens: new tokens a sequence, may be 0. context_lens: tokens a sequence including the new ones.
    first_row: row of the first query, behind those of sequences that are not cut into tiles.
    The longest first keeps the last wave short, as the work of a causal tile grows with its position.
    Made once a step on the host and shared by all layers.
    """
    counts = -(-query_lens // rows)
    seq = np.repeat(np.arange(len(query_lens)), counts)
    start = (np.arange(len(seq)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
    row0 = first_row + np.cumsum(query_lens) - query_lens
    tiles = np.stack(
        (seq, row0[seq] + start, np.minimum(rows, query_lens[seq] - start),
         (context_lens - query_lens)[seq] + start), axis=1,
    )  # fmt: skip
    return tiles[np.argsort(-tiles[:, 3], kind="stable")].astype(np.int32)


def prefill_tiles(
    query_lens: list[int], context_lens: list[int], rows: int, device: torch.device | str,
    first_row: int = 0,
) -> torch.Tensor:  # fmt: skip
    """query_tiles() as a tensor on the device."""
    tiles = query_tiles(np.array(query_lens), np.array(context_lens), rows, first_row)
    return torch.from_numpy(tiles).to(device)


def paged_prefill(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    tiles: torch.Tensor, out: torch.Tensor, tile: PrefillTile, scale: float, window: int = 0,
    softcap: float = 0.0, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of each sequence's new tokens over its paged context.

    q, out: [tokens, heads, head_dim], contiguous, sequences one after another. k_cache, v_cache:
    [blocks, block, kv_heads, head_dim]. block_table: int32 [seqs, max blocks]. tiles: prefill_tiles() of this
    step with `tile.rows`. window, softcap, sinks: as in paged_decode. Writes and returns `out`.
    """
    _, heads, dim = q.shape
    count = tiles.shape[0]
    if count == 0:
        return out
    use_tma = tile.tma and can_use_tma(k_cache, tile.tile) and can_use_tma(v_cache, tile.tile)
    paged_prefill_kernel[(heads, count)](
        rows_of_heads(q, tile.rows) if use_tma else q,
        cache_argument(k_cache, tile.tile, use_tma), cache_argument(v_cache, tile.tile, use_tma),
        block_table, tiles, sinks if sinks is not None else q, out,
        scale * LOG2_E.value, softcap * LOG2_E.value, window,
        q.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0),
        GROUP=heads // k_cache.shape[2], ROWS=tile.rows, DIM=dim, DIM_PAD=triton.next_power_of_2(dim),
        BLOCK=k_cache.shape[1], TILE=tile.tile, HAS_SINK=sinks is not None, SOFTCAP=softcap > 0,
        WINDOW=window > 0, TMA=use_tma, CT=compute_type(q.dtype), **launch_options(tile),
    )  # fmt: skip
    return out
