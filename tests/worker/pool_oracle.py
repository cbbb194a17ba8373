"""Bytes of the pool by cause, found out place by place: what `accounting` must say."""

from tilefleet_worker.accounting import PoolBytes
from tilefleet_worker.layer_kinds import LayerKind
from tilefleet_worker.scheduler import Scheduler

LIVE, RESERVED, WASTED = "live", "reserved", "wasted"


def counted(scheduler: Scheduler, index: int) -> dict[str, int]:
    """Bytes of referenced blocks of one kind by cause; of a shared place the best cause counts."""
    kind, pool = scheduler.pool.kinds[index], scheduler.pool
    causes: dict[int, list[str]] = {}
    for sequence in scheduler._roster.running:
        for head, found in _of_sequence(scheduler, sequence.slot, index, kind).items():
            known = causes.setdefault(head, [WASTED] * pool.block_size)
            best = (LIVE, RESERVED, WASTED).index
            causes[head] = [min(pair, key=best) for pair in zip(known, found, strict=True)]
    places = [cause for found in causes.values() for cause in found]
    scale = kind.width * pool.token_bytes
    return {cause: places.count(cause) * scale for cause in (LIVE, RESERVED, WASTED)}


def _of_sequence(
    scheduler: Scheduler, slot: int, index: int, kind: LayerKind
) -> dict[int, list[str]]:
    table, size = scheduler._roster.table, scheduler.pool.block_size
    held = table.kinds[index]
    computed = int(table.num_computed[slot])
    known = max(int(table.num_tokens[slot] + table.num_ahead[slot]), int(table.num_scheduled[slot]))
    seen = max(0, computed - kind.window + 1) if kind.window else 0

    def cause(position: int) -> str:
        if position >= computed:
            return RESERVED if position < known else WASTED
        return LIVE if position >= seen else WASTED

    return {
        int(held.block_ids[slot, span * kind.width]): [
            cause(span * size + place) for place in range(size)
        ]
        for span in range(int(held.first_span[slot]), int(held.num_spans[slot]))
    }


def _allowed_spans(scheduler: Scheduler, kind: LayerKind) -> int:
    """One a request; two for a window that ends inside a block at both of its ends."""
    table, slots = scheduler._roster.table, scheduler._roster.slots
    if not kind.window:
        return len(slots)
    if kind.window % scheduler.pool.block_size:
        return 2 * len(slots)
    known = table.num_tokens[slots] + table.num_ahead[slots]
    decodes = known - table.num_computed[slots] == 1
    return int(decodes.sum() + 2 * (~decodes).sum())


def check_sums(scheduler: Scheduler) -> PoolBytes:
    """The published bytes sum to the pool, and waste keeps its bound."""
    pool, said = scheduler.pool, scheduler.gauges().bytes_by_cause
    assert sum(said.by_cause().values()) == said.total
    assert said.total == (pool.num_blocks + 1) * pool.block_size * pool.token_bytes
    assert sum(said.host_by_cause().values()) == said.host_total
    assert said.host_total == (pool.host.num_blocks * said.spare if pool.host else 0)
    for kind, made in zip(pool.kinds, said.kinds, strict=True):
        assert min(made.live, made.reserved, made.cached, made.wasted) >= 0
        span_bytes = kind.width * pool.block_size * pool.token_bytes
        assert made.wasted <= _allowed_spans(scheduler, kind) * span_bytes
    return said


def check_accounting(scheduler: Scheduler) -> None:
    """Besides, every cause has exactly its bytes."""
    pool, said = scheduler.pool, check_sums(scheduler)
    for index, (kind, made) in enumerate(zip(pool.kinds, said.kinds, strict=True)):
        found = counted(scheduler, index)
        assert found == {LIVE: made.live, RESERVED: made.reserved, WASTED: made.wasted}
        span_bytes = kind.width * pool.block_size * pool.token_bytes
        assert made.cached == pool.num_idle_spans[index] * span_bytes
        spans_on_host = len(pool.host.spans(index)) if pool.host else 0
        assert made.on_host == spans_on_host * span_bytes
