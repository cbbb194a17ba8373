"""The scheduler: which tokens of which requests the next step computes.

There is no prefill and no decode: every request has tokens, of which some are computed, and a step
hands out a budget until it is spent. Long prompts are thereby computed in chunks, next to the
decodes of others; a prefix hit and a preemption only change how many tokens are computed.

Why it always makes progress: a request that cannot fit the empty pool is refused at the door, the
oldest running request may take the blocks of all younger ones, and ages never change.
"""

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.errors import ConfigError, EngineError
from tilefleet_worker.request import Delta, FinishReason, Refusal, Request
from tilefleet_worker.sequence import Sequence
from tilefleet_worker.step import StepPlan, StepResult, StepRow

# A request that does not fit lets smaller ones pass, but not for ever.
MAX_OVERTAKEN = 64
# Waiting requests that one step looks at: bounds its cost however long the queue is.
ADMISSION_WINDOW = 16


@dataclass(frozen=True, slots=True)
class SchedulerGauges:
    """The scheduler's state as numbers, and its counters so far."""

    running: int
    waiting: int
    waiting_prompt_tokens: int
    oldest_arrival_seconds: float | None
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    counts: Mapping[str, int]


class Scheduler:
    """Owns all requests in progress and the block pool. One thread; no clock; no tensor."""

    def __init__(
        self,
        pool: BlockPool,
        max_batch_tokens: int,
        max_concurrent: int,
        max_model_len: int,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        for name, value in (
            ("max_batch_tokens", max_batch_tokens),
            ("max_concurrent", max_concurrent),
            ("max_model_len", max_model_len),
            ("vocab_size", vocab_size),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1.")
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_concurrent = max_concurrent
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._running: list[Sequence] = []  # both lists: oldest first
        self._waiting: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._next_order = 0
        self._counts = dict.fromkeys(
            (
                "prompt_tokens_computed",
                "prompt_tokens_cached",
                "generated_tokens",
                "completions",
                "aborts",
                "errors",
                "preemptions",
            ),
            0,
        )

    @property
    def has_work(self) -> bool:
        """True while any request is in progress."""
        return bool(self._by_id)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt and answer together that can be served."""
        return min(self.max_model_len, self.pool.num_blocks * self.pool.block_size)

    def refusal(self, request: Request) -> Refusal | None:
        """Why this request can never be served, or None. Reads nothing that changes."""
        prompt = request.prompt_token_ids
        if not prompt:
            message = "The prompt has no tokens: send at least one."
            return Refusal(400, "empty_prompt", message, "prompt")
        lowest, highest = min(prompt), max(prompt)
        if lowest < 0 or highest >= self.vocab_size:
            bad = lowest if lowest < 0 else highest
            message = f"Token id {bad} is not in the vocabulary of {self.vocab_size} tokens."
            return Refusal(400, "invalid_token_id", message, "prompt")
        if request.max_total_tokens <= self.max_total_tokens:
            return None
        return Refusal(400, "context_length_exceeded", self._too_long(request), "max_tokens")

    def _too_long(self, request: Request) -> str:
        cause = (
            f"the model length of {self.max_model_len} tokens"
            if self.max_total_tokens == self.max_model_len
            else f"the KV cache of {self.max_total_tokens} tokens"
        )
        return (
            f"The prompt has {len(request.prompt_token_ids)} tokens and max_tokens is "
            f"{request.params.max_tokens}: together {request.max_total_tokens}, above the limit of "
            f"{self.max_total_tokens} set by {cause}. Shorten the prompt or lower max_tokens."
        )

    def add(self, request: Request) -> Refusal | None:
        """Queue a request, or say why it can never be served."""
        refusal = self.refusal(request)
        if refusal is not None:
            return refusal
        if request.request_id in self._by_id:
            message = f"Request id {request.request_id!r} is in flight: use another one."
            return Refusal(400, "duplicate_request_id", message, None)
        sequence = Sequence(request, self._next_order, self._eos_token_ids)
        self._next_order += 1
        self._by_id[request.request_id] = sequence
        self._waiting.append(sequence)
        return None

    def schedule(self) -> StepPlan:
        """Decide the next step. Running requests first, decodes before chunks of prompts.

        An empty plan is legal. Allocates blocks; computes nothing.
        """
        preempted = self._grow_running()
        rows: list[StepRow] = []
        budget = self.max_batch_tokens
        for sequence in sorted(self._running, key=_decodes_first):
            budget -= self._add_row(rows, sequence, budget)
        if not preempted:
            self._admit_waiting(rows, budget)
        return StepPlan(tuple(rows))

    def _grow_running(self) -> bool:
        """Give every running request a block for its next token, oldest first.

        Where blocks run out the youngest lose theirs. Returns whether that happened: a step that
        preempts must not admit, or the two would undo each other.
        """
        preempted = False
        for sequence in tuple(self._running):
            missing = self.pool.blocks_for(sequence.num_tokens) - len(sequence.block_ids)
            if missing <= 0 or not sequence.block_ids:
                continue  # enough, or preempted a moment ago
            while self.pool.num_available < missing and sequence.block_ids:
                self._preempt(self._running[-1])
                preempted = True
            if sequence.block_ids:
                sequence.block_ids += self.pool.allocate(missing)
        return preempted

    def _preempt(self, sequence: Sequence) -> None:
        """Take a request's blocks. It waits again, at its age, and recomputes its tokens."""
        self._running.remove(sequence)
        sequence.release(self.pool)
        sequence.num_preemptions += 1
        insort(self._waiting, sequence, key=_age)
        self._counts["preemptions"] += 1

    def _add_row(self, rows: list[StepRow], sequence: Sequence, budget: int) -> int:
        """Append as much of a request as the budget allows. Returns the tokens it took."""
        length = min(sequence.num_remaining, budget)
        if length > 1 and self._others_want_prompts(sequence):
            length = min(length, max(1, self.max_batch_tokens // 2))
        if length > 0:
            rows.append(sequence.row(length))
        return length

    def _others_want_prompts(self, sequence: Sequence) -> bool:
        """True when another request could use a part of the budget for its prompt."""
        if self._waiting and len(self._running) < self.max_concurrent:
            return True
        return any(s.num_remaining > 1 for s in self._running if s is not sequence)

    def _admit_waiting(self, rows: list[StepRow], budget: int) -> None:
        """Admit what fits, oldest first. One that does not fit lets younger ones pass, bounded."""
        passed: list[Sequence] = []
        for sequence in self._waiting[:ADMISSION_WINDOW]:
            if budget <= 0 or len(self._running) >= self.max_concurrent:
                break
            if self._try_admit(sequence):
                budget -= self._add_row(rows, sequence, budget)
                for older in passed:
                    older.num_overtaken += 1
                continue
            passed.append(sequence)
            if sequence.num_preemptions or sequence.num_overtaken >= MAX_OVERTAKEN:
                break

    def _try_admit(self, sequence: Sequence) -> bool:
        """Admit a request if its tokens fit beside what running requests will still need."""
        hits = self.pool.match(sequence.prefix_hashes(self.pool))
        needed = self.pool.blocks_for(sequence.num_tokens) - len(hits)
        available = self.pool.num_available - self.pool.num_idle_of(hits)
        if needed + self._growth_reserve() > available:
            return False
        first_time = sequence.num_cached_tokens is None
        sequence.admit(self.pool, hits)
        if first_time:
            self._counts["prompt_tokens_cached"] += sequence.num_cached_tokens or 0
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_age)
        return True

    def _growth_reserve(self) -> int:
        """Blocks kept for running requests: all that the oldest can need, one for each other.

        With the oldest covered it always finishes, so every queue drains; covering all of them
        would waste most of the pool on answers that end early.
        """
        if not self._running:
            return 0
        oldest = self._running[0]
        total = self.pool.blocks_for(oldest.request.max_total_tokens)
        return total - len(oldest.block_ids) + len(self._running) - 1

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        """Take in what a step computed. Rows of requests that ended meanwhile are ignored."""
        deltas: list[Delta] = []
        for row in plan.rows:
            sequence = self._by_id.get(row.request_id)
            if sequence is None or not sequence.block_ids:
                continue
            if row.request_id in result.faults:
                deltas.append(self._finish(sequence, "error", result.faults[row.request_id]))
                continue
            self._count_prompt(sequence, row)
            sequence.advance(self.pool, row.end)
            if row.sample:
                deltas.append(self._take_token(sequence, result.tokens.get(row.request_id)))
        return deltas

    def _count_prompt(self, sequence: Sequence, row: StepRow) -> None:
        computed = min(row.end, sequence.num_prompt_tokens) - row.start
        self._counts["prompt_tokens_computed"] += max(0, computed)

    def _take_token(self, sequence: Sequence, token_id: int | None) -> Delta:
        if token_id is None or not 0 <= token_id < self.vocab_size:
            return self._finish(sequence, "error", f"The step produced no valid token ({token_id})")
        self._counts["generated_tokens"] += 1
        reason = sequence.append(token_id)
        if reason is not None:
            return self._finish(sequence, reason, None, (token_id,))
        cached = sequence.num_cached_tokens or 0
        return Delta(sequence.request_id, (token_id,), None, None, cached)

    def abort(self, request_id: str) -> list[Delta]:
        """End a request at the caller's wish. An unknown id is ignored."""
        sequence = self._by_id.get(request_id)
        return [] if sequence is None else [self._finish(sequence, "abort", None)]

    def fail(self, request_id: str, message: str) -> list[Delta]:
        """End one request with an error, also one that was never queued."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            return [self._finish(sequence, "error", message)]
        self._counts["errors"] += 1
        return [Delta(request_id, (), "error", message)]

    def end_all(self, reason: FinishReason, message: str | None) -> list[Delta]:
        """End everything in progress, oldest first."""
        return [self._finish(s, reason, message) for s in sorted(self._by_id.values(), key=_age)]

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: str | None,
        token_ids: tuple[int, ...] = (),
    ) -> Delta:
        """The only place where a request ends: forget it and free its blocks."""
        del self._by_id[sequence.request_id]
        (self._running if sequence.block_ids else self._waiting).remove(sequence)
        sequence.release(self.pool)
        self._counts[{"abort": "aborts", "error": "errors"}.get(reason, "completions")] += 1
        cached = sequence.num_cached_tokens or 0
        return Delta(sequence.request_id, token_ids, reason, error, cached)

    def gauges(self) -> SchedulerGauges:
        """State as numbers, as of now."""
        return SchedulerGauges(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_prompt_tokens=sum(s.num_prompt_tokens for s in self._waiting),
            oldest_arrival_seconds=min(
                (s.request.arrival_seconds for s in self._waiting), default=None
            ),
            blocks_total=self.pool.num_blocks,
            blocks_used=self.pool.num_referenced,
            blocks_cached=self.pool.num_idle,
            counts=dict(self._counts),
        )

    def check_integrity(self) -> None:
        """Raise EngineError unless lists, tables and pool agree. Tests call it each step."""
        self.pool.check_integrity([s.block_ids for s in self._running])
        if sorted(self._by_id) != sorted(s.request_id for s in self._running + self._waiting):
            raise EngineError("a request is lost or queued twice")
        if len(self._running) > self.max_concurrent:
            raise EngineError("more requests run than max_concurrent")
        for ordered in (self._running, self._waiting):
            if ordered != sorted(ordered, key=_age):
                raise EngineError("a queue is not in order of age")
        if any(s.block_ids or s.num_computed for s in self._waiting):
            raise EngineError("a waiting request holds blocks")
        if any(s.num_computed > len(s.block_ids) * self.pool.block_size for s in self._running):
            raise EngineError("a request computed tokens beyond its blocks")


def _age(sequence: Sequence) -> int:
    return sequence.order


def _decodes_first(sequence: Sequence) -> tuple[bool, int]:
    return sequence.num_remaining > 1, sequence.order
