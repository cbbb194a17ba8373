"""What a step computed becomes part of its requests: tokens, endings, prefixes for others.

Whole arrays at a time: only requests that end, or that ask for more than a token, are looked at.
Knows no budget and no queue.
"""

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from itertools import repeat

import numpy as np

from tilefleet_worker.drafts import Drafts
from tilefleet_worker.request import Delta, FinishReason, TokenLogprob
from tilefleet_worker.request_table import Ints
from tilefleet_worker.roster import Roster
from tilefleet_worker.step import StepPlan, StepResult


class Results:
    """Takes in the results of steps, in the order in which those were scheduled."""

    def __init__(self, roster: Roster, drafts: Drafts, vocab_size: int) -> None:
        self.pool = roster.pool
        self.vocab_size = vocab_size
        self._roster = roster
        self._table = roster.table
        self._drafts = drafts
        self._windows = any(kind.window for kind in roster.pool.kinds)

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        """Take in what a step computed. Rows of requests that ended meanwhile are ignored.

        Steps are committed in the order in which they were scheduled.
        """
        table = self._table
        plan = self._alive(plan)
        errors: list[Delta] = []
        if result.faults:
            errors = self._end_faulty(plan, result.faults)
            plan = self._alive(plan)
        ends = plan.ends
        table.num_computed[plan.slots] = ends
        if (plan.starts < table.num_prompt[plan.slots]).any():
            self._count_prompts(plan, ends)
        if result.prompt_logprobs:
            self._take_scores(plan, result.prompt_logprobs)
        sampled = plan if plan.sample.all() else plan.select(plan.sample)
        deltas = self._drafts.take(plan, result, self._take_tokens(sampled, result))
        if self._windows:
            self._drop_unseen(self._alive(plan))
        return deltas + errors if errors else deltas

    def _count_prompts(self, plan: StepPlan, ends: Ints) -> None:
        prompt_ends = np.minimum(ends, self._table.num_prompt[plan.slots])
        computed = int(np.maximum(prompt_ends - plan.starts, 0).sum())
        self._roster.counts["prompt_tokens_computed"] += computed
        if self.pool.prefix_caching:
            self._publish_prompts(plan)

    def discard(self, plan: StepPlan) -> None:
        """Forget that these tokens were scheduled."""
        plan = self._alive(plan)
        self._table.num_scheduled[plan.slots] = plan.starts
        self._table.num_ahead[plan.slots] -= plan.sample

    def settled(self, plan: StepPlan) -> StepPlan:
        """The rows of requests that still run, none of them with a pending token."""
        alive = self._alive(plan)
        return replace(alive, pending=np.zeros(len(alive), np.bool_))

    def _take_scores(self, plan: StepPlan, found: Mapping[str, tuple[TokenLogprob, ...]]) -> None:
        for request_id, start in zip(plan.request_ids, plan.starts.tolist(), strict=True):
            if request_id in found:
                self._roster.by_id[request_id].take_scores(start, found[request_id])

    def _end_faulty(self, plan: StepPlan, faults: Mapping[str, str]) -> list[Delta]:
        faulty = [request_id for request_id in plan.request_ids if request_id in faults]
        return [self._roster.finish(self._roster.by_id[i], "error", faults[i]) for i in faulty]

    def _alive(self, plan: StepPlan) -> StepPlan:
        alive = self._table.epoch[plan.slots] == plan.epochs
        return plan if alive.all() else plan.select(alive)

    def _publish_prompts(self, plan: StepPlan) -> None:
        """Make prompts findable as soon as they are computed: others may begin alike.

        An answer becomes findable when its request leaves, so that decodes need no hash.
        """
        slots = plan.slots[plan.starts < self._table.num_prompt[plan.slots]]
        for sequence in self._roster.owners(slots):
            sequence.publish(self._table, self.pool)

    def _drop_unseen(self, plan: StepPlan) -> None:
        """Give back what left a window. A step under way starts behind what this one computed, so
        it reads none of it.
        """
        computed, leaves = self._table.num_computed[plan.slots], np.zeros(len(plan), np.bool_)
        for kind, held in zip(self.pool.kinds, self._table.kinds, strict=True):
            if kind.window:
                first = np.maximum(computed - kind.window + 1, 0) // self.pool.block_size
                leaves |= first > held.first_span[plan.slots]
        for sequence in self._roster.owners(plan.slots[leaves]):
            sequence.drop_unseen(self._table, self.pool)

    def _take_tokens(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        """Append a token to each of these requests, all of which want one."""
        if not len(plan):
            return []
        tokens = result.tokens
        if list(tokens) == plan.request_ids:  # as all runners give them; spares the look-ups
            values = np.fromiter(tokens.values(), np.int64, len(plan))
        else:
            values = np.fromiter(map(tokens.get, plan.request_ids, repeat(-1)), np.int64, len(plan))
        self._table.num_ahead[plan.slots] -= 1
        plain = self._table.plain[plan.slots]
        all_valid = bool(values.min() >= 0 and values.max() < self.vocab_size)
        if all_valid and plain.all():
            return self._append(plan, values, result, plain=True)
        valid = (values >= 0) & (values < self.vocab_size)
        special = valid & ~plain
        refused = self._take_special(plan.select(special), tokens) if special.any() else {}
        if refused:
            valid &= [request_id not in refused for request_id in plan.request_ids]
        if valid.all():
            return self._append(plan, values, result)
        deltas = self._append(plan.select(valid), values[valid], result)
        for request_id in plan.select(~valid).request_ids:
            message = f"The step produced no valid token ({tokens.get(request_id)})"
            message = refused.get(request_id, message)
            deltas.append(self._roster.finish(self._roster.by_id[request_id], "error", message))
        return deltas

    def _take_special(self, plan: StepPlan, tokens: Mapping[str, int]) -> dict[str, str]:
        """Tell histories and grammars their tokens. Returns why some were refused, by id."""
        refused = {}
        for sequence in self._roster.owners(plan.slots):
            try:
                sequence.take(tokens[sequence.request_id])
            except ValueError as error:
                refused[sequence.request_id] = f"The grammar refuses its token: {error}"
        return refused

    def _append(
        self, plan: StepPlan, values: Ints, result: StepResult, *, plain: bool = False
    ) -> list[Delta]:
        """Append these tokens, all valid, and end the requests that end with them.

        plain: no request asks for more than its token.
        """
        table, slots, token_ids = self._table, plan.slots, values.tolist()
        answers = self._roster.token_ids(slots)
        deque(map(array.append, answers, token_ids), maxlen=0)  # in C: half the time of a loop
        lengths = table.num_tokens[slots] + 1
        table.num_tokens[slots] = lengths
        table.last_token[slots] = values
        self._roster.counts["generated_tokens"] += len(token_ids)
        cached = table.num_cached[slots].tolist()
        none = repeat(None)
        nothing: repeat[tuple[TokenLogprob, ...]] = repeat(())
        fields = zip(
            plan.request_ids, zip(token_ids), none, none, cached, nothing, nothing,
            repeat(0), none, repeat(0), strict=False,
        )  # fmt: skip
        # Delta(*fields) runs Python for each; this builds the same tuples in half the time.
        deltas: list[Delta] = list(map(tuple.__new__, repeat(Delta), fields))
        stops = table.ending(slots, token_ids)
        ends = stops | (lengths >= table.limit[slots])
        if plain and not ends.any():
            return deltas
        owners = list(self._roster.owners(slots))
        for index in np.flatnonzero(ends).tolist():
            reason: FinishReason = "stop" if stops[index] else "length"
            deltas[index] = self._roster.finish(owners[index], reason, None, (token_ids[index],))
        if plain:
            return deltas
        found = [result.logprobs.get(delta.request_id) for delta in deltas]
        return [s.scored(d, f) for s, d, f in zip(owners, deltas, found, strict=True)]
