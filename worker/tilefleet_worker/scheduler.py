"""The scheduler: which tokens of which requests the next step computes.

There is no prefill and no decode: every request has tokens, of which some are computed, and a step
hands out a budget until it is spent. Long prompts are thereby computed in chunks, next to the
decodes of others; a prefix hit and a preemption only change how many tokens are computed.

Why it always makes progress: a request that cannot fit the empty pool is refused at the door, the
first running request may take the blocks of all behind it, and turns never change.
"""

import numpy as np

from tilefleet_worker.admission import Limits
from tilefleet_worker.block_pool import BlockPool, Hit
from tilefleet_worker.drafts import Drafts
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.layer_kinds import Demand
from tilefleet_worker.request import Delta, FinishReason, Refusal, Request
from tilefleet_worker.request_table import Ints
from tilefleet_worker.results import Results
from tilefleet_worker.roster import Roster, SchedulerGauges
from tilefleet_worker.sequence import Sequence
from tilefleet_worker.step import StepPlan, StepResult

# A request that does not fit lets smaller ones pass, but not for ever.
MAX_OVERTAKEN = 64
# Waiting requests that one step looks at: bounds its cost however long the queue is.
ADMISSION_WINDOW = 16
# Positions of prompts whose logits one step keeps: 256 · 150,000 fp32 logits are 154 MB.
MAX_SCORED_TOKENS = 256
# A decode at a context of 1,000 takes the time of 2 tokens of a prompt (8B on an H100): beside 64
# for each, decodes are a thirtieth of a step.
PROMPT_TOKENS_PER_DECODE = 64
_NOBODY: Ints = np.zeros(0, np.int64)


class Scheduler:
    """Decides over the roster of requests and the block pool. One thread; no clock; no tensor."""

    def __init__(
        self,
        pool: BlockPool,
        max_batch_tokens: int,
        max_concurrent: int,
        max_model_len: int,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        max_drafts: int = 0,
        prompt_tokens: int = 0,
    ) -> None:
        """max_drafts: most tokens that a step guesses for a request; 0 guesses none. prompt_tokens:
        tokens of prompts that fill a step of the device while nobody decodes; 0: max_batch_tokens.
        """
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
        self._prompt_tokens = prompt_tokens or max_batch_tokens
        self.max_concurrent = max_concurrent
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._demand = Demand(pool.kinds, pool.block_size, max_batch_tokens)
        self.limits = Limits.of(self._demand, pool.num_blocks, max_model_len, vocab_size)
        # Every running request holds a block, so there are never more of them than blocks.
        num_slots = min(max_concurrent, pool.num_blocks)
        self._roster = Roster(pool, self._demand, num_slots, self.limits.max_total_tokens)
        self._table = self._roster.table
        self._drafts = Drafts(self._roster, max_drafts)
        self._results = Results(self._roster, self._drafts, vocab_size)
        self._eos_token_ids = eos_token_ids

    @property
    def has_work(self) -> bool:
        """True while any request is in progress."""
        return bool(self._roster.by_id)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._roster.running)

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt and answer together that can be served."""
        return self.limits.max_total_tokens

    def refusal(self, request: Request) -> Refusal | None:
        """Why this request can never be served, or None. Reads nothing that changes."""
        return self.limits.refusal(request)

    def add(self, request: Request) -> Refusal | None:
        """Queue a request, or say why it can never be served."""
        return self.refusal(request) or self.enqueue(request)

    def enqueue(self, request: Request) -> Refusal | None:
        """Queue a request that `refusal` did not refuse, unless its id is in use."""
        if request.request_id in self._roster.by_id:
            message = f"Request id {request.request_id!r} is in flight: use another one."
            return Refusal(400, "duplicate_request_id", message, None)
        self._roster.add(request, self._eos_token_ids)
        return None

    # Scheduling ---------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step. Running requests first, decodes before chunks of prompts.

        An empty plan is legal. Allocates blocks; computes nothing. May be called once more before
        the commit of the step before: a request whose next token has no name yet then gets a row
        with a pending token where that is possible, and no row otherwise. Where that step must end
        before blocks can be taken from anybody, the plan is empty.
        """
        preempted = self._grow_running()
        if preempted is None:
            return self._plan(_NOBODY, _NOBODY, None)
        slots = self._roster.slots
        remaining = self._remaining(slots)
        is_decode = remaining == 1
        decodes = slots if is_decode.all() else slots[is_decode]
        if len(decodes) > self.max_batch_tokens:
            decodes = decodes[: self.max_batch_tokens]
        chunks: dict[int, int] = {}
        budget = self._prompt_budget(len(decodes))
        prompts = remaining > 1
        num_prompts = int(np.count_nonzero(prompts))
        if num_prompts:
            budget -= self._take_chunks(chunks, slots[prompts], remaining[prompts], budget)
        if self._roster.waiting and not preempted:
            self._admit_waiting(chunks, budget, num_prompts)
        lengths = np.ones(len(decodes) + len(chunks), np.int64)
        drafts = None
        if self._drafts.most and len(decodes):
            budget = self.max_batch_tokens - len(decodes) - sum(chunks.values())
            drafts = self._drafts.propose(decodes, budget)
        if chunks:
            lengths[len(decodes) :] = list(chunks.values())
            decodes = np.concatenate((decodes, np.array(list(chunks), np.int64)))
        if drafts is not None:
            drafts = np.pad(drafts, (0, len(chunks)))
            lengths += drafts
        return self._plan(decodes, lengths, drafts)

    def take_transfers(self) -> list[Transfer]:
        """Blocks to copy, in this order, before the newest plan is run; also if it is empty."""
        return self.pool.take_transfers()

    def _prompt_budget(self, num_decodes: int) -> int:
        """Tokens of prompts for a step. The smaller a step, the sooner the first prompts answer;
        but each step reads the contexts of all who decode, and the others wait for that.
        """
        most = self._prompt_tokens + PROMPT_TOKENS_PER_DECODE * num_decodes
        return min(most, self.max_batch_tokens - num_decodes)

    def _remaining(self, slots: Ints) -> Ints:
        """Tokens of each slot that can be scheduled now."""
        table = self._table
        ahead = table.num_ahead[slots]
        known = table.num_tokens[slots] + ahead
        remaining = known - table.num_scheduled[slots]
        if ahead.any():
            # The pending token may be the last one, or the host must see it to choose the next.
            held = (ahead > 0) & ((known >= table.limit[slots]) | ~table.plain[slots])
            remaining[held] = 0
        return remaining

    def _plan(self, slots: Ints, lengths: Ints, drafts: Ints | None) -> StepPlan:
        """Make the plan of these slots and note it in the table. lengths: with drafts."""
        table = self._table
        starts = table.num_scheduled[slots]
        ends = starts + lengths
        known = table.num_tokens[slots]
        table.num_scheduled[slots] = ends
        if drafts is not None:
            ends = ends - drafts
        sample = ends == known + table.num_ahead[slots]
        table.num_ahead[slots] += sample
        if len(slots):
            self.pool.begin_step()
        owners, epochs = tuple(self._roster.owners(slots)), table.epoch[slots]
        return StepPlan(table, owners, slots, epochs, starts, lengths, sample, ends > known, drafts)

    def _grow_running(self) -> bool | None:
        """Give every running request blocks for its next tokens, in the order of turns.

        Where blocks run out, those whose turn is last lose theirs. Returns whether that happened:
        a step that preempts must not admit, or the two would undo each other. None: it would have
        to happen, but a step under way still uses those blocks.
        """
        preempted = False
        for index in range(len(self.pool.kinds)):
            grown = self._grow_kind(index)
            if grown is None:
                return None
            preempted |= grown
        return preempted

    def _grow_kind(self, index: int) -> bool | None:
        table, slots, running = self._table, self._roster.slots, self._roster.running
        kind, held = self.pool.kinds[index], self._table.kinds[index]
        wanted = table.num_tokens[slots] + table.num_ahead[slots]
        if kind.window:
            soon = table.num_scheduled[slots] + self.max_batch_tokens
            wanted = np.minimum(wanted, soon)
        missing = -(-wanted // self.pool.block_size) - held.num_spans[slots]
        short = np.flatnonzero(missing > 0)
        if not len(short):
            return False
        if int(missing.max()) == 1 and len(short) * kind.width <= self.pool.num_available:
            held.append_each(slots[short], self.pool.allocate(len(short), index))
            return False
        blocks = int(missing[short].sum()) * kind.width
        if self.pool.num_steps_under_way and blocks > self.pool.num_available:
            return None
        preempted = False
        for sequence, count in [(running[i], int(missing[i])) for i in short.tolist()]:
            while sequence.is_running and self.pool.num_available < count * kind.width:
                self._roster.preempt(running[-1])
                preempted = True
            if sequence.is_running:
                held.extend(sequence.slot, self.pool.allocate(count, index))
        return preempted

    def _take_chunks(
        self, chunks: dict[int, int], slots: Ints, remaining: Ints, budget: int
    ) -> int:
        """Give running requests with prompts left their share. Returns the tokens they took."""
        shared = len(slots) > 1 or self._could_admit()
        taken = 0
        for slot, wanted in zip(slots.tolist(), remaining.tolist(), strict=True):
            length = min(self._share(wanted, shared), budget - taken)
            taken += self._add_chunk(chunks, self._roster.by_slot[slot], length)
        return taken

    def _add_chunk(self, chunks: dict[int, int], sequence: Sequence, length: int) -> int:
        """Note up to `length` tokens of a request, fewer if its prompt is to be scored."""
        if sequence.wants_scores:
            owners = self._roster.by_slot
            scored = sum(n for slot, n in chunks.items() if owners[slot].wants_scores)
            length = min(length, MAX_SCORED_TOKENS - scored)
        if length > 0:
            chunks[sequence.slot] = length
        return max(0, length)

    def _share(self, wanted: int, shared: bool) -> int:
        """Most of a prompt that one step computes: half the budget while others want some."""
        budget = min(self._prompt_tokens, self.max_batch_tokens)
        return min(wanted, max(1, budget // 2)) if shared else wanted

    def _could_admit(self) -> bool:
        roster = self._roster
        return bool(roster.waiting) and len(roster.running) < self.max_concurrent

    def _admit_waiting(self, chunks: dict[int, int], budget: int, num_prompts: int) -> None:
        """Admit what fits, in order. One that does not fit lets later ones pass, bounded.

        One whose next block a running request is just computing waits for it: answers to the same
        prompt that arrive together share its blocks. num_prompts: running requests that have more
        than one token left to compute.
        """
        passed: list[Sequence] = []
        under_way = {running.next_hash(self._table) for running in self._roster.running}
        for sequence in self._roster.waiting[:ADMISSION_WINDOW]:
            if budget <= 0 or self.num_running >= self.max_concurrent:
                break
            hit = self.pool.match(hashes := sequence.prefix_hashes(self.pool))
            if hit.num_spans < len(hashes) and hashes[hit.num_spans] in under_way:
                continue
            if self._try_admit(sequence, hit):
                under_way.add(sequence.next_hash(self._table))
                wanted = sequence.num_tokens - int(self._table.num_computed[sequence.slot])
                shared = num_prompts > 0 or self._could_admit()
                length = min(self._share(wanted, shared), budget)
                budget -= self._add_chunk(chunks, sequence, length)
                num_prompts += wanted > 1
                for older in passed:
                    older.num_overtaken += 1
                continue
            passed.append(sequence)
            if sequence.num_preemptions or sequence.num_overtaken >= MAX_OVERTAKEN:
                break

    def _try_admit(self, sequence: Sequence, hit: Hit) -> bool:
        """Admit a request if its tokens fit beside what running requests will still need.

        hit: its longest known prefix.
        """
        spans = self._demand.admission(sequence.num_tokens, hit.num_spans)
        available = self.pool.num_available - self.pool.num_taken_by(hit)
        if self._demand.blocks(spans) + self._growth_reserve() > available:
            return False
        self._roster.admit(sequence, hit)
        return True

    def _growth_reserve(self) -> int:
        """Blocks kept for running requests: all that the first can need, a span for each other.

        With the first covered it always finishes, so every queue drains; covering all of them
        would waste most of the pool on answers that end early.
        """
        if not self._roster.running:
            return 0
        first = self._roster.running[0]
        held = self._demand.blocks([kind.num_held(first.slot) for kind in self._table.kinds])
        most = self._demand.most_blocks(first.request.max_total_tokens)
        return max(0, most - held) + self._demand.span_blocks * (self.num_running - 1)

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        """Take in what a step computed. Rows of requests that ended meanwhile are ignored.

        Steps are committed in the order in which they were scheduled.
        """
        if len(plan):
            self.pool.end_step()
        return self._results.commit(plan, result)

    def discard(self, plan: StepPlan) -> None:
        """Take the newest step back as if it had not been scheduled: its rows come again.

        The device must be done with it.
        """
        if len(plan):
            self.pool.end_step()
        self._results.discard(plan)

    def settled(self, plan: StepPlan) -> StepPlan:
        """The rows of requests that still run, to be computed again.

        All steps before it must be committed, so that every token has a name.
        """
        return self._results.settled(plan)

    # Endings ------------------------------------------------------------------------------------

    def abort(self, request_id: str, reason: FinishReason = "abort") -> list[Delta]:
        """End a request from outside. An unknown id is ignored."""
        sequence = self._roster.by_id.get(request_id)
        return [] if sequence is None else [self._roster.finish(sequence, reason, None)]

    def fail(self, request_id: str, message: str) -> list[Delta]:
        """End one request with an error, also one that was never queued."""
        sequence = self._roster.by_id.get(request_id)
        if sequence is not None:
            return [self._roster.finish(sequence, "error", message)]
        self._roster.counts["errors"] += 1
        return [Delta(request_id, (), "error", message)]

    def expire(self, now_seconds: float) -> list[Delta]:
        """End the requests whose deadline has passed; their blocks are free at once."""
        overdue = self._roster.overdue(now_seconds)
        return [self._roster.finish(s, "timeout", _timed_out(s)) for s in overdue]

    def end_all(self, reason: FinishReason, message: str | None) -> list[Delta]:
        """End everything in progress, in order."""
        return [self._roster.finish(s, reason, message) for s in self._roster.in_order()]

    # State --------------------------------------------------------------------------------------

    def take_started(self) -> list[str]:
        """Ids of requests that left the queue for the first time since the last call."""
        started, self._roster.started = self._roster.started, []
        return started

    def gauges(self) -> SchedulerGauges:
        """State as numbers, as of now."""
        return self._roster.gauges()

    def check_integrity(self) -> None:
        """Raise EngineError unless lists, table and pool agree. Tests call it each step."""
        self._roster.check_integrity()


def _timed_out(sequence: Sequence) -> str:
    made = sequence.num_tokens - sequence.num_prompt_tokens
    state = f"after {made} tokens" if sequence.is_running or made else "while it waited"
    return f"The request's time was over {state}."
