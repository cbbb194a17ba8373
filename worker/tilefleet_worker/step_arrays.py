"""A plan in numpy arrays, in the order in which the device computes it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilefleet_worker.step import StepPlan

Ints = npt.NDArray[np.integer]
Samples = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A plan in arrays. Rows of one token first, then longer ones; tokens in that order."""

    order: Ints | None
    """Index in the plan of each row here; None: the order of the plan."""
    num_decodes: int
    token_ids: Ints  # [tokens]; -1 - slot: the newest token of that slot, known to the device only
    positions: Ints  # [tokens]
    slots: Ints  # [tokens]: block · block_size + place
    context_lens: Ints  # [rows]
    lengths: Ints  # [rows]
    block_table: Ints  # [rows, blocks of the widest]
    logits_index: Ints | None
    """Tokens whose logits are wanted, row by row; None: those of all tokens."""
    samples: Samples  # [rows whose token the device chooses], see request_table.SAMPLER
    sampled: Ints
    """Index in the plan of each row of `samples`."""

    def row_of(self, sample: int) -> int:
        """Row here of one of the samples."""
        index = int(self.sampled[sample])
        return index if self.order is None else self.order.tolist().index(index)

    @property
    def num_rows(self) -> int:
        """Requests of the step."""
        return len(self.context_lens)

    @property
    def decode_only(self) -> bool:
        """True when every row is one token: such a step can be a captured graph."""
        return self.num_decodes == self.num_rows


def lay_out(plan: StepPlan, block_size: int) -> StepArrays:
    """Lay out a plan that has rows. Raises IndexError when a row reaches beyond its blocks."""
    table, ends, slots = plan.table, plan.ends, plan.slots
    beyond = np.flatnonzero(ends > table.num_blocks[slots] * block_size)
    if len(beyond):
        raise IndexError(f"request {plan.request_ids[beyond[0]]} reaches beyond its blocks")
    width = -(-int(ends.max()) // block_size)
    if bool((plan.lengths == 1).all() and plan.sample.all() and table.plain[slots].all()):
        blocks = table.block_ids[slots, :width]
        every = np.arange(len(plan))
        place = blocks[every, plan.starts // block_size]
        return StepArrays(
            None, len(plan), np.where(plan.pending, -1 - slots, table.last_token[slots]),
            plan.starts, place * block_size + plan.starts % block_size, ends, plan.lengths, blocks,
            None, _samples(plan, every, every), every,
        )  # fmt: skip
    return _lay_out_rows(plan, width, block_size)


def _lay_out_rows(plan: StepPlan, width: int, block_size: int) -> StepArrays:
    """The general case: rows of any length, spelled out."""
    order = np.argsort(plan.lengths > 1, kind="stable")
    rows = [plan.rows[index] for index in order.tolist()]
    lengths, ends, slots = plan.lengths[order], plan.ends[order], plan.slots[order]
    blocks = plan.table.block_ids[slots, :width]
    row_of = np.repeat(np.arange(len(rows)), lengths)
    last = np.cumsum(lengths)  # tokens before the end of each row
    positions = np.arange(last[-1]) - (last - ends)[row_of]
    places = blocks[row_of, positions // block_size] * block_size + positions % block_size
    token_ids = np.fromiter((t for row in rows for t in row.token_ids), np.int64, int(last[-1]))
    pending = plan.pending[order]
    token_ids[last[pending] - 1] = -1 - slots[pending]
    wanted = [
        np.append(first + np.arange(len(row.targets)), [end - 1] * row.sample)
        for row, first, end in zip(rows, last - lengths, last, strict=True)
    ]
    chosen = plan.sample[order] & plan.table.plain[slots]
    logits_row = np.cumsum([row.num_logits for row in rows]) - 1
    sampled = order[chosen]
    return StepArrays(
        order, int((lengths == 1).sum()), token_ids, positions, places, ends, lengths, blocks,
        np.concatenate(wanted).astype(np.int64), _samples(plan, sampled, logits_row[chosen]),
        sampled,
    )  # fmt: skip


def _samples(plan: StepPlan, rows: Ints, logits_row: Ints) -> Samples:
    """What the device's sampler reads of these rows of the plan."""
    samples = plan.table.sampler[plan.slots[rows]]
    samples["logits_row"], samples["position"] = logits_row, plan.ends[rows]
    return samples
