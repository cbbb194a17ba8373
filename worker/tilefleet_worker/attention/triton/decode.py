"""Paged decode attention: one query token a sequence, KV split by a fixed length, reduced in order.

A program computes splits of one (sequence, KV head): all query heads of the group against `SPLIT`
keys each. In a large batch one program takes all of them. Otherwise the last program to finish a (sequence, KV head) combines the partial results in index order,
so the sum's order never depends on timing, and one launch does the whole layer. The split length depends
on nothing but the architecture (tiles.py), and how many splits a program takes changes no bit: a request
gets the same bits alone and in any batch. The grid depends on the number of sequences and not on their
length, so a captured graph serves every context.

Sources: FlashAttention-2 (arXiv 2307.08691), split-KV decoding (Flash-Decoding, PyTorch blog 2023),
paged KV (arXiv 2309.06180). Knows nothing of requests, schedulers or models.
"""

import torch
import triton
import triton.language as tl

from tilefleet_worker.attention.triton.softmax import LOG2_E, combine, scores, take_sink, take_tile
from tilefleet_worker.attention.triton.tiles import DecodeTile, launch_options
from tilefleet_worker.target import compute_type

# Programs that fill the largest device (304 compute units) several times over: splits beyond that
# many are taken in turns.
PROGRAMS = 2048


@triton.jit
def paged_decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, context_ptr, sink_ptr, out_ptr, part_ptr, stat_ptr, count_ptr,
    scale_log2, softcap_log2, window,
    stride_q, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_table, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SINK: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads, parts, sequences); heads vary fastest: neighbours share DRAM pages.

    Part p computes the splits p, p + parts, … of those in use. A context of 0 computes nothing.
    """
    head, part, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(1)
    context = tl.load(context_ptr + seq)
    first = tl.maximum(context - window, 0) if WINDOW else 0
    first_split = first // SPLIT
    used = tl.cdiv(context, SPLIT) - first_split
    if part >= used:
        return

    r = tl.arange(0, ROWS)
    d = tl.arange(0, DIM_PAD)
    t = tl.arange(0, TILE)
    row_ok, dim_ok = r < GROUP, d < DIM
    q_head = head * GROUP + r
    q = tl.load(
        q_ptr + seq.to(tl.int64) * stride_q + q_head[:, None] * DIM + d[None, :],
        mask=row_ok[:, None] & dim_ok[None, :], other=0.0,
    ).to(CT)  # fmt: skip
    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    table = table_ptr + seq.to(tl.int64) * stride_table
    group = seq * KV_HEADS + head
    cell = (group.to(tl.int64) * splits) * GROUP
    alone = parts == 1  # this program takes all splits: it combines them as it goes, in registers
    m_all, total_all, acc_all = m, total, acc
    for split in tl.range(first_split + part, first_split + used, parts):
        m = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        begin = split * SPLIT
        end = tl.minimum(begin + SPLIT, context)
        for start in tl.range(tl.maximum(begin, first // TILE * TILE), end, TILE):
            pos = start + t
            ok = pos < end
            if WINDOW:
                ok = ok & (pos >= first)
            if BLOCK >= TILE:  # one page holds the tile: one scalar load instead of TILE
                page = tl.load(table + start // BLOCK).to(tl.int64)
                slot = start % BLOCK + t
                k_row = page * stride_kb + slot * stride_kt
                v_row = page * stride_vb + slot * stride_vt
            else:
                page = tl.load(table + pos // BLOCK, mask=ok, other=0).to(tl.int64)
                k_row = page * stride_kb + (pos % BLOCK) * stride_kt
                v_row = page * stride_vb + (pos % BLOCK) * stride_vt
            k_at = k_ptr + k_row[:, None] + head * stride_kh + d[None, :]
            v_at = v_ptr + v_row[:, None] + head * stride_vh + d[None, :]
            load_ok = ok[:, None] & dim_ok[None, :]
            k = tl.load(k_at, mask=load_ok, other=0.0)
            v = tl.load(v_at, mask=load_ok, other=0.0)
            s = scores(q, k, scale_log2, softcap_log2, SOFTCAP, CT)
            s = tl.where(ok[None, :], s, -float("inf"))
            m, total, acc = take_tile(m, total, acc, s, v, False, CT)
        if alone:
            m_all, total_all, acc_all = combine(m_all, total_all, acc_all, m, total, acc)
        elif used > 1:
            here = cell + split * GROUP + r
            tl.store(part_ptr + here[:, None] * DIM_PAD + d[None, :], acc, mask=row_ok[:, None])
            tl.store(stat_ptr + here * 2, m, mask=row_ok)
            tl.store(stat_ptr + here * 2 + 1, total, mask=row_ok)

    out = out_ptr + seq.to(tl.int64) * stride_q + q_head[:, None] * DIM + d[None, :]
    out_ok = row_ok[:, None] & dim_ok[None, :]
    if alone:
        m, total, acc = m_all, total_all, acc_all
    elif used > 1:
        mine = tl.cdiv(used - part, parts)
        tl.debug_barrier()  # every warp's partial is written before the counter says so
        arrived = tl.atomic_add(count_ptr + group, mine, sem="acq_rel")
        if arrived + mine < used:
            return
        tl.store(count_ptr + group, 0)  # ready for the next layer or replay
        m = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        for i in tl.range(first_split, first_split + used):
            there = cell + i * GROUP + r
            # .cg: other SMs wrote these; L1 may hold older bytes
            m_i = tl.load(stat_ptr + there * 2, mask=row_ok, other=0.0, cache_modifier=".cg")
            total_i = tl.load(
                stat_ptr + there * 2 + 1, mask=row_ok, other=1.0, cache_modifier=".cg"
            )
            acc_at = part_ptr + there[:, None] * DIM_PAD + d[None, :]
            acc_i = tl.load(acc_at, mask=row_ok[:, None], other=0.0, cache_modifier=".cg")
            m, total, acc = combine(m, total, acc, m_i, total_i, acc_i)
    if HAS_SINK:
        sink = tl.load(sink_ptr + q_head, mask=row_ok, other=-float("inf"))
        m, total, acc = take_sink(m, total, acc, sink)
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=out_ok)


class DecodeWorkspace:
    """Scratch of the split-KV reduction, allocated once and shared by all layers.

    Holds max_splits partial results per (sequence, KV head). The counters are zero between launches.
    """

    def __init__(
        self, max_seqs: int, kv_heads: int, group: int, head_dim: int, max_context: int, tile: DecodeTile,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        dim = triton.next_power_of_2(head_dim)
        self.splits = triton.cdiv(max_context, tile.split)
        cells = max_seqs * kv_heads * self.splits * group if self.splits > 1 else 0
        self.partial = torch.empty(max(1, cells) * dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(max(1, cells) * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(max_seqs * kv_heads, dtype=torch.int32, device=device)


def paged_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    context_lens: torch.Tensor, out: torch.Tensor, workspace: DecodeWorkspace, tile: DecodeTile,
    scale: float, max_context: int, window: int = 0, softcap: float = 0.0,
    sinks: torch.Tensor | None = None, programs: int = PROGRAMS,
) -> torch.Tensor:  # fmt: skip
    """Attention of one new token a sequence over its paged context, which includes that token.

    q, out: [seqs, heads, head_dim], contiguous. k_cache, v_cache: [blocks, block, kv_heads, head_dim]
    (any strides but the last, which is 1; more than 2^31 elements are fine). block_table: int32
    [seqs, max blocks]. context_lens: int32 [seqs], each ≤ max_context; 0 leaves its row of `out` as it is. window: keys visible, 0 = all.
    softcap: scores become cap·tanh(score / cap), 0 = off. sinks: fp32 [heads], one valueless logit a head.
    programs: wanted in the grid; changes no bit. Writes and returns `out`. Bits depend on the sequence alone, never on its batch-mates.
    """
    seqs, heads, dim = q.shape
    block, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    wanted = triton.cdiv(programs, kv_heads * seqs)
    parts = min(triton.cdiv(max_context, tile.split), wanted)
    paged_decode_kernel[(kv_heads, parts, seqs)](
        q, k_cache, v_cache, block_table, context_lens, sinks if sinks is not None else q, out,
        workspace.partial, workspace.stats, workspace.counters,
        scale * LOG2_E.value, softcap * LOG2_E.value, window,
        q.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0), workspace.splits,
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim), BLOCK=block, TILE=tile.tile, SPLIT=tile.split,
        HAS_SINK=sinks is not None, SOFTCAP=softcap > 0, WINDOW=window > 0,
        CT=compute_type(q.dtype), **launch_options(tile),
    )  # fmt: skip
    return out
