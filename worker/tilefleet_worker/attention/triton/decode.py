"""Paged decode attention: one query token a sequence, KV split by its length, reduced in order.

A sequence is cut into splits whose length depends on what it sees and on nothing else (`split_length`):
short for short contexts, so that a lone one fills the device, and longer for long ones, so that their
partial results stay few. A program takes consecutive splits of one (sequence, KV head), all query heads of
the group at once. If it takes all of them it combines them in registers; otherwise the last program to
finish a (sequence, KV head) combines the partial results. Both go in index order with the same operations,
so that neither timing nor batch-mates change a bit. The grid depends on the number of sequences and not on
their length, so a captured graph serves every context.

Sources: FlashAttention-2 (arXiv 2307.08691), split-KV decoding (Flash-Decoding, PyTorch blog 2023),
paged KV (arXiv 2309.06180). Knows nothing of requests, schedulers or models.
"""

import torch
import triton
import triton.language as tl

from tilefleet_worker.attention.triton.pages import cache_argument, can_use_tma, load_tile, page_at
from tilefleet_worker.attention.triton.softmax import LOG2_E, combine, scores, take_sink, take_tile
from tilefleet_worker.attention.triton.tiles import DecodeTile, launch_options
from tilefleet_worker.target import compute_type

# Splits of one sequence at which their length doubles, first; then at each four times the tokens.
MANY_SPLITS = 16
DOUBLINGS = 5
# (Sequence, KV head) pairs that fill a device without being split: one program each, up to 16 splits.
# Fewer: PARTS each at least; below SCARCE one a split (8 pairs of 131072: 195 us, by two 226; H100).
PLENTY, PARTS, SCARCE = 512, 4, 32
_FIRST_STEP, _STEPS = tl.constexpr(MANY_SPLITS), tl.constexpr(DOUBLINGS)


@triton.jit
def _split_length(visible, SPLIT: tl.constexpr):
    """split_length() on the device."""
    length = SPLIT
    for power in tl.static_range(_STEPS):
        length += tl.where(visible > (SPLIT * _FIRST_STEP << 2 * power), SPLIT << power, 0)
    return length


@triton.jit
def _write(out_ptr, sink_ptr, m, total, acc, q_head, row, ok, d, DIM: tl.constexpr, HAS_SINK: tl.constexpr):  # fmt: skip
    """Store the result of a state, with the sinks of its heads. row: offset of the sequence."""
    if HAS_SINK:
        m, total, acc = take_sink(m, total, acc, tl.load(sink_ptr + q_head, mask=ok, other=0.0))
    at = out_ptr + row + q_head[:, None] * DIM + d[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(at, out, mask=ok[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["window", "splits", "least", "stride_table"])
def paged_decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, context_ptr, sink_ptr, out_ptr, part_ptr, stat_ptr, count_ptr,
    scale_log2, softcap_log2, window,
    stride_q, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_table, splits, least,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SINK: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads, parts, sequences); heads vary fastest: neighbours share DRAM pages.

    Every part takes the same number of consecutive splits, `least` or more; those behind the last
    split do nothing. A context of 0 computes nothing. least and the number of parts change no bit.
    """
    head, part, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_ptr + seq)
    first = tl.maximum(context - window, 0) if WINDOW else 0
    length = _split_length(context - first, SPLIT)
    whole = context // TILE * TILE
    # what is left of a tile belongs to the last split, so that no split holds only that
    last_split = tl.maximum(tl.cdiv(whole, length) - 1, 0)
    first_split = tl.minimum(first // length, last_split)
    used = last_split - first_split + 1
    share = tl.maximum(tl.cdiv(used, tl.num_programs(1)), least)
    mine = part * share
    if (mine >= used) | (context == 0):
        return
    active = tl.cdiv(used, share)
    stop = tl.minimum(mine + share, used)
    begin = tl.maximum((first_split + mine) * length, first // TILE * TILE)
    end = tl.where(stop == used, whole, (first_split + stop) * length)

    r, d, t = tl.arange(0, ROWS), tl.arange(0, DIM_PAD), tl.arange(0, TILE)
    row_ok = r < GROUP
    q_head = head * GROUP + r
    q_row = seq.to(tl.int64) * stride_q
    q_at = q_ptr + q_row + q_head[:, None] * DIM + d[None, :]
    q = tl.load(q_at, mask=row_ok[:, None] & (d < DIM)[None, :], other=0.0).to(CT)
    table = table_ptr + seq.to(tl.int64) * stride_table
    group = seq * KV_HEADS + head
    cell = group.to(tl.int64) * splits * GROUP
    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    m_all, total_all, acc_all = m, total, acc
    split = mine
    page = page_at(table, begin, context, BLOCK, TILE)
    for start in tl.range(begin, end, TILE):
        if (start % length == 0) & (start > begin):  # a split is complete
            if active == 1:
                m_all, total_all, acc_all = combine(m_all, total_all, acc_all, m, total, acc)
            else:
                here = cell + split * GROUP + r
                tl.store(part_ptr + here[:, None] * DIM_PAD + d[None, :], acc, mask=row_ok[:, None])
                tl.store(stat_ptr + here * 2, m, mask=row_ok)
                tl.store(stat_ptr + here * 2 + 1, total, mask=row_ok)
            split += 1
            m = tl.full([ROWS], -float("inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        next_page = page_at(table, start + TILE, context, BLOCK, TILE)
        k = load_tile(
            k_ptr, table, page, start, first, context, head, stride_kb, stride_kt, stride_kh,
            BLOCK, TILE, DIM, DIM_PAD, WINDOW, TMA,
        )  # fmt: skip
        v = load_tile(
            v_ptr, table, page, start, first, context, head, stride_vb, stride_vt, stride_vh,
            BLOCK, TILE, DIM, DIM_PAD, WINDOW, TMA,
        )  # fmt: skip
        s = scores(q, k, scale_log2, softcap_log2, SOFTCAP, CT)
        if WINDOW:
            s = tl.where((start + t >= first)[None, :], s, -float("inf"))
        m, total, acc = take_tile(m, total, acc, s, v, False, CT)
        page = next_page
    if (stop == used) & (context > whole):
        k = load_tile(
            k_ptr, table, page, whole, first, context, head, stride_kb, stride_kt, stride_kh,
            BLOCK, TILE, DIM, DIM_PAD, True, TMA,
        )  # fmt: skip
        v = load_tile(
            v_ptr, table, page, whole, first, context, head, stride_vb, stride_vt, stride_vh,
            BLOCK, TILE, DIM, DIM_PAD, True, TMA,
        )  # fmt: skip
        ok = (whole + t >= first) & (whole + t < context)
        s = scores(q, k, scale_log2, softcap_log2, SOFTCAP, CT)
        s = tl.where(ok[None, :], s, -float("inf"))
        m, total, acc = take_tile(m, total, acc, s, v, False, CT)

    if active == 1:
        m, total, acc = combine(m_all, total_all, acc_all, m, total, acc)
        _write(out_ptr, sink_ptr, m, total, acc, q_head, q_row, row_ok, d, DIM, HAS_SINK)
        return
    here = cell + split * GROUP + r
    tl.store(part_ptr + here[:, None] * DIM_PAD + d[None, :], acc, mask=row_ok[:, None])
    tl.store(stat_ptr + here * 2, m, mask=row_ok)
    tl.store(stat_ptr + here * 2 + 1, total, mask=row_ok)
    tl.debug_barrier()  # every warp's partial is written before the counter says so
    if tl.atomic_add(count_ptr + group, 1, sem="acq_rel") + 1 < active:
        return
    tl.store(count_ptr + group, 0)  # ready for the next layer or replay
    PAD: tl.constexpr = triton.next_power_of_2(GROUP)
    r = tl.arange(0, PAD)
    row_ok = r < GROUP
    m = tl.full([PAD], -float("inf"), tl.float32)
    total = tl.zeros([PAD], tl.float32)
    acc = tl.zeros([PAD, DIM_PAD], tl.float32)
    for i in tl.range(0, used, UNROLL):
        for j in tl.static_range(UNROLL):  # independent loads, which wait together
            there = cell + (i + j) * GROUP + r
            ok = r < tl.where(i + j < used, GROUP, 0)
            # .cg: other SMs wrote these; L1 may hold older bytes
            m_i = tl.load(stat_ptr + there * 2, mask=ok, other=-float("inf"), cache_modifier=".cg")
            total_i = tl.load(stat_ptr + there * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
            acc_at = part_ptr + there[:, None] * DIM_PAD + d[None, :]
            acc_i = tl.load(acc_at, mask=ok[:, None], other=0.0, cache_modifier=".cg")
            m, total, acc = combine(m, total, acc, m_i, total_i, acc_i)
    _write(out_ptr, sink_ptr, m, total, acc, head * GROUP + r, q_row, row_ok, d, DIM, HAS_SINK)


UNROLL = tl.constexpr(8)


def split_length(visible: int, split: int) -> int:
    """Tokens of a split of a sequence that sees `visible` keys, of which a kernel's shortest is `split`.

    Up to 16 splits of `split`; then twice the length whenever the keys are four times as many, so that
    the number of splits grows as the root: 64 at 131,072 keys and 512. At most 32 · split.
    """
    return split << sum(visible > step for step in _steps(split))


def most_splits(max_context: int, split: int) -> int:
    """Most splits of any sequence of up to max_context tokens: of the longest, or just before a step.

    One more than their lengths say: a window may begin and end within a split.
    """
    contexts = [max_context, *(step for step in _steps(split) if step < max_context)]
    return max(-(-context // split_length(context, split)) for context in contexts) + 1


def _steps(split: int) -> list[int]:
    """The longest contexts of each length of splits but the last."""
    return [split * MANY_SPLITS << 2 * power for power in range(DOUBLINGS)]


class DecodeWorkspace:
    """Scratch of the split-KV reduction, allocated once and shared by all layers.

    Holds max_splits partial results per (sequence, KV head). The counters are zero between launches.
    """

    def __init__(
        self, max_seqs: int, kv_heads: int, group: int, head_dim: int, max_context: int, tile: DecodeTile,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        dim = triton.next_power_of_2(head_dim)
        self.splits = most_splits(max_context, tile.split)
        cells = max_seqs * kv_heads * self.splits * group
        self.partial = torch.empty(cells * dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(cells * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(max_seqs * kv_heads, dtype=torch.int32, device=device)


def paged_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    context_lens: torch.Tensor, out: torch.Tensor, workspace: DecodeWorkspace, tile: DecodeTile,
    scale: float, window: int = 0, softcap: float = 0.0,
    sinks: torch.Tensor | None = None, programs: int | None = None, least: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of one new token a sequence over its paged context, which includes that token.

    q, out: [seqs, heads, head_dim], contiguous. k_cache, v_cache: [blocks, block, kv_heads, head_dim]
    (any strides but the last, which is 1; more than 2^31 elements are fine). block_table: int32
    [seqs, max blocks]. context_lens: int32 [seqs], each ≤ the workspace's max_context; 0 leaves its row of
    `out` as it is. window: keys visible, 0 = all. softcap: scores become cap·tanh(score / cap), 0 = off.
    sinks: fp32 [heads], one valueless logit a head. programs: wanted in the grid; least: fewest splits of a
    program; both change no bit: those depend on the sequence alone. Writes and returns `out`.
    """
    seqs, heads, dim = q.shape
    block, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    pairs = kv_heads * seqs
    plenty = pairs >= PLENTY
    few = max(tile.programs, 1024 if pairs < SCARCE else PARTS * pairs)
    wanted = triton.cdiv(programs or (1024 if plenty else few), pairs)
    use_tma = tile.tma and can_use_tma(k_cache, tile.tile) and can_use_tma(v_cache, tile.tile)
    paged_decode_kernel[(kv_heads, min(workspace.splits, wanted), seqs)](
        q, cache_argument(k_cache, tile.tile, use_tma), cache_argument(v_cache, tile.tile, use_tma),
        block_table, context_lens, sinks if sinks is not None else q, out,
        workspace.partial, workspace.stats, workspace.counters,
        scale * LOG2_E.value, softcap * LOG2_E.value, window,
        q.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0), workspace.splits,
        least or (MANY_SPLITS if plenty else 1),
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim), BLOCK=block, TILE=tile.tile, SPLIT=tile.split,
        HAS_SINK=sinks is not None, SOFTCAP=softcap > 0, WINDOW=window > 0, TMA=use_tma,
        CT=compute_type(q.dtype), **launch_options(tile),
    )  # fmt: skip
    return out
