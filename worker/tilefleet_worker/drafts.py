"""Speculative decoding: guesses go into a step as further tokens of a row, and those that come true
are kept.

A draft is accepted when it is the very token that the request would have got: the likeliest one, or
the one drawn with the number of (request, position). So answers do not depend on speculation, nor
on what was guessed. Drafts are computed from budget and blocks that nobody else wants, never
hashed, and forgotten at the commit. Knows no queue.
"""

import numpy as np

from tilefleet_worker.prompt_lookup import propose
from tilefleet_worker.request import Delta, FinishReason
from tilefleet_worker.request_table import Ints
from tilefleet_worker.roster import Roster
from tilefleet_worker.sequence import Sequence
from tilefleet_worker.step import StepPlan, StepResult


class Drafts:
    """Proposes at most `most` tokens for each decode of a step, and takes in what came true."""

    def __init__(self, roster: Roster, most: int) -> None:
        self.most = most
        self._roster = roster
        self._table = roster.table

    def propose(self, decodes: Ints, budget: int) -> Ints | None:
        """Draft for these slots within a budget of tokens. Returns how many each got, or None.

        Only for requests whose tokens depend on logits, sampling parameters and position alone, and
        that have no step under way.
        """
        table = self._table
        room = np.minimum(table.limit[decodes] - table.num_tokens[decodes] - 1, self.most)
        room[~table.plain[decodes] | (table.num_ahead[decodes] > 0)] = 0
        counts = np.zeros(len(decodes), np.int64)
        for index in np.flatnonzero(room > 0).tolist():
            if budget < 1:
                break
            sequence = self._roster.by_slot[int(decodes[index])]
            found = propose(sequence.token_ids, min(budget, int(room[index])))
            if found and self._make_room(sequence, len(found)):
                sequence.drafts = tuple(found)
                counts[index] = len(found)
                budget -= len(found)
        return counts if counts.any() else None

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Give a request blocks for its drafts, unless that would take them from others."""
        pool, demand = self._roster.pool, self._roster.demand
        spans = demand.spans(sequence.num_tokens + count)
        missing = [max(0, spans - int(kind.num_spans[sequence.slot])) for kind in self._table.kinds]
        if demand.blocks(missing) > pool.num_available:
            return False
        for index, (kind, more) in enumerate(zip(self._table.kinds, missing, strict=True)):
            kind.extend(sequence.slot, pool.allocate(more, index))
        return True

    def take(self, plan: StepPlan, result: StepResult, deltas: list[Delta]) -> list[Delta]:
        """Append the drafts that came true. Returns the deltas with them.

        plan: rows whose first token has been taken in, so some of their requests have ended.
        """
        if plan.num_drafts is None:
            return deltas
        counts = self._roster.counts
        rows = zip(plan.owners, plan.slots, plan.epochs, plan.num_drafts.tolist(), strict=True)
        by_id = {delta.request_id: delta for delta in deltas}
        for owner, slot, epoch, num_drafts in rows:
            if not num_drafts:
                continue
            counts["drafts"] += 1
            counts["draft_tokens"] += num_drafts
            if self._table.epoch[slot] != epoch:
                continue
            sequence = self._roster.by_id[owner.request_id]
            accepted = result.accepted.get(owner.request_id, ())[:num_drafts]
            by_id[owner.request_id] = self._append(sequence, accepted, by_id[owner.request_id])
            self._forget(sequence)
        return list(by_id.values())

    def _append(self, sequence: Sequence, accepted: tuple[int, ...], delta: Delta) -> Delta:
        """Append tokens one by one: each may end the request, and those behind it are dropped."""
        table, slot, made = self._table, sequence.slot, list(delta.token_ids)
        for token_id in accepted:
            # What the token before it computed is in the cache.
            table.num_computed[slot] += 1
            sequence.token_ids.append(token_id)
            table.num_tokens[slot] += 1
            table.last_token[slot] = token_id
            made.append(token_id)
            self._roster.counts["generated_tokens"] += 1
            self._roster.counts["accepted_tokens"] += 1
            reason = self._end(sequence, token_id)
            if reason is not None:
                return self._roster.finish(sequence, reason, None, tuple(made))
        return delta._replace(token_ids=tuple(made))

    def _end(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        table, slot, length = self._table, sequence.slot, sequence.num_tokens
        if length > table.end_from[slot] and token_id in sequence.end_token_ids:
            return "stop"
        return "length" if length >= table.limit[slot] else None

    def _forget(self, sequence: Sequence) -> None:
        """Go back to the tokens that are known, and give the blocks of the others back."""
        sequence.drafts = ()
        if not sequence.is_running:
            return
        table, slot, pool = self._table, sequence.slot, self._roster.pool
        table.num_scheduled[slot] = table.num_computed[slot]
        spans = self._roster.demand.spans(sequence.num_tokens)
        for index, kind in enumerate(table.kinds):
            if kind.num_spans[slot] > spans:
                pool.release(kind.drop_last(slot, spans), index)
