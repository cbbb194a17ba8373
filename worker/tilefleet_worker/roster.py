"""The roster: all requests in progress, who of them runs and who waits, each in the order of turns.

Owns the table and moves requests between the two lists, keeping lists, table and pool in step.
Knows no budget and no policy: the scheduler decides.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tilefleet_worker.accounting import PoolBytes, accounting
from tilefleet_worker.block_pool import BlockPool, Hit
from tilefleet_worker.deadlines import Deadlines
from tilefleet_worker.errors import EngineError
from tilefleet_worker.fair_order import FairOrder, Turn
from tilefleet_worker.layer_kinds import Demand
from tilefleet_worker.request import Delta, FinishReason, Request
from tilefleet_worker.request_table import Ints, RequestTable
from tilefleet_worker.sequence import Sequence

_COUNTS = (
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "generated_tokens",
    "completions",
    "aborts",
    "timeouts",
    "errors",
    "preemptions",
    "drafts",
    "draft_tokens",
    "accepted_tokens",
)
_COUNT_OF_REASON = {"abort": "aborts", "timeout": "timeouts", "error": "errors"}


@dataclass(frozen=True, slots=True)
class SchedulerGauges:
    """The scheduler's state as numbers, and its counters so far.

    Blocks are counted as if each held all layers, so that blocks · block_size are tokens.
    """

    running: int
    waiting: int
    waiting_prompt_tokens: int
    oldest_arrival_seconds: float | None
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    tokens_wasted: int
    """Places for tokens of running requests that hold none, or one that left a window."""
    bytes_by_cause: PoolBytes
    counts: Mapping[str, int]


class Roster:
    """`running` and `waiting` are in order of turns; only the methods here change them."""

    def __init__(
        self, pool: BlockPool, demand: Demand, num_slots: int, max_total_tokens: int
    ) -> None:
        self.pool = pool
        self.demand = demand
        self.table = RequestTable(num_slots, demand.spans(max_total_tokens), pool.kinds)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.by_id: dict[str, Sequence] = {}
        self.by_slot: dict[int, Sequence] = {}
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.started: list[str] = []
        """Ids of requests that left the queue for the first time, until somebody takes note."""
        self._order = FairOrder()
        self._deadlines = Deadlines()
        self._waiting_prompt_tokens = 0
        # Of `running`, until that changes.
        self._slots: Ints | None = None
        self._token_ids: list[array[int]] = []

    @property
    def slots(self) -> Ints:
        """Slots of the running requests, in order: the same array until one comes or goes."""
        if self._slots is None:
            self._slots = np.array([s.slot for s in self.running], np.int64)
            self._token_ids = [s.token_ids for s in self.running]
        return self._slots

    def owners(self, slots: Ints) -> Iterable[Sequence]:
        """Requests of these slots."""
        if slots is self._slots:
            return self.running
        return map(self.by_slot.__getitem__, slots.tolist())

    def token_ids(self, slots: Ints) -> "list[array[int]]":
        """Tokens of the requests of these slots, to be appended to."""
        if slots is self._slots:
            return self._token_ids
        return [sequence.token_ids for sequence in self.owners(slots)]

    def add(self, request: Request, eos_token_ids: tuple[int, ...]) -> None:
        """Take in a new request: it waits for its turn."""
        sequence = Sequence(request, self._order.turn(request), eos_token_ids)
        self.by_id[sequence.request_id] = sequence
        self._deadlines.add(request)
        self._wait(sequence)

    def admit(self, sequence: Sequence, hit: Hit) -> None:
        """Let a waiting request run. The pool must have the blocks that the hit does not cover."""
        first_time = sequence.num_cached_tokens is None
        self._stop_waiting(sequence)
        self._order.admitted(sequence.request, sequence.turn)
        sequence.admit(self.table, self.pool, self.demand, hit)
        if first_time:
            self.started.append(sequence.request_id)
            self.counts["prompt_tokens_cached"] += sequence.num_cached_tokens or 0
        insort(self.running, sequence, key=_turn)
        self.by_slot[sequence.slot] = sequence
        self._slots = None

    def preempt(self, sequence: Sequence) -> None:
        """Take a running request's blocks. It waits again, at its turn, with its tokens."""
        self._stop_running(sequence, publish=True)
        sequence.num_preemptions += 1
        self._wait(sequence)
        self.counts["preemptions"] += 1

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: str | None,
        token_ids: tuple[int, ...] = (),
    ) -> Delta:
        """The only place where a request ends: forget it and free its blocks."""
        del self.by_id[sequence.request_id]
        self._deadlines.forget(sequence.request)
        self._order.settle(sequence.request, sequence.turn, sequence.num_tokens)
        if sequence.is_running:
            # What a faulty request computed must not be found by others.
            self._stop_running(sequence, publish=reason != "error")
        else:
            self._stop_waiting(sequence)
        self.counts[_COUNT_OF_REASON.get(reason, "completions")] += 1
        cached = sequence.num_cached_tokens or 0
        return Delta(
            sequence.request_id, token_ids, reason, error, cached,
            num_preemptions=sequence.num_preemptions, num_host_tokens=sequence.num_host_tokens,
        )  # fmt: skip

    def overdue(self, now_seconds: float) -> list[Sequence]:
        """Requests in progress whose deadline has passed. Each is named once."""
        return [self.by_id[name] for name in self._deadlines.passed(now_seconds)]

    def in_order(self) -> list[Sequence]:
        """Everything in progress."""
        return sorted(self.by_id.values(), key=_turn)

    def _stop_running(self, sequence: Sequence, *, publish: bool) -> None:
        if publish:
            sequence.publish(self.table, self.pool)
        del self.running[bisect_left(self.running, sequence.turn, key=_turn)]
        del self.by_slot[sequence.slot]
        self._slots = None
        sequence.release(self.table, self.pool)

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_turn)
        self._waiting_prompt_tokens += sequence.num_prompt_tokens

    def _stop_waiting(self, sequence: Sequence) -> None:
        del self.waiting[bisect_left(self.waiting, sequence.turn, key=_turn)]
        self._waiting_prompt_tokens -= sequence.num_prompt_tokens

    def gauges(self) -> SchedulerGauges:
        """State as numbers, as of now."""
        span_blocks = self.demand.span_blocks
        total = self.pool.num_blocks // span_blocks
        used = min(total, -(-self.pool.num_referenced // span_blocks))
        found = accounting(self.pool, self.table, self.slots)
        wasted = sum(kind.wasted for kind in found.kinds)
        return SchedulerGauges(
            running=len(self.running),
            waiting=len(self.waiting),
            waiting_prompt_tokens=self._waiting_prompt_tokens,
            oldest_arrival_seconds=self._oldest_arrival_seconds(),
            blocks_total=total,
            blocks_used=used,
            blocks_cached=min(total - used, self.pool.num_idle // span_blocks),
            tokens_wasted=wasted // (self.pool.token_bytes * span_blocks),
            bytes_by_cause=found,
            counts=dict(self.counts),
        )

    def _oldest_arrival_seconds(self) -> float | None:
        """Arrival of the request that waits longest; `by_id` keeps the order of arrival."""
        if not self.waiting:
            return None
        return next(s.request.arrival_seconds for s in self.by_id.values() if not s.is_running)

    def check_integrity(self) -> None:
        """Raise EngineError unless lists, table and pool agree."""
        table, slots = self.table, self.slots
        self.pool.check_integrity([[k.held(s.slot) for s in self.running] for k in table.kinds])
        if sorted(self.by_id) != sorted(s.request_id for s in self.running + self.waiting):
            raise EngineError("a request is lost or queued twice")
        if slots.tolist() != [s.slot for s in self.running]:
            raise EngineError("the slots of the running requests are outdated")
        if {s.slot: s for s in self.running} != self.by_slot:
            raise EngineError("a slot has another owner than its request")
        if len(self.running) + table.num_free != table.num_slots:
            raise EngineError("a slot is lost or used twice")
        for ordered in (self.running, self.waiting):
            if ordered != sorted(ordered, key=_turn):
                raise EngineError("a queue is not in order")
        if any(s.is_running for s in self.waiting):
            raise EngineError("a waiting request holds a slot")
        if self._waiting_prompt_tokens != sum(s.num_prompt_tokens for s in self.waiting):
            raise EngineError("the sum of waiting prompt tokens is wrong")
        if [s.num_tokens for s in self.running] != table.num_tokens[slots].tolist():
            raise EngineError("the table's lengths are not those of the requests")
        if (table.num_computed[slots] > table.num_scheduled[slots]).any():
            raise EngineError("a request computed tokens that were never scheduled")
        for kind, held in zip(self.pool.kinds, table.kinds, strict=True):
            if (table.num_scheduled[slots] > held.num_spans[slots] * self.pool.block_size).any():
                raise EngineError("a request was scheduled beyond its blocks")
            seen = table.num_computed[slots] - kind.window + 1 if kind.window else 0 * slots
            if (held.first_span[slots] * self.pool.block_size > np.maximum(seen, 0)).any():
                raise EngineError(f"a request lacks blocks that its {kind.name} layers see")


def _turn(sequence: Sequence) -> Turn:
    return sequence.turn
