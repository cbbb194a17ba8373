"""What the first rank tells the others, as int32 arrays: no pickles, and little to send.

A message is its kind and its numbers. A step is sent as what the device reads of it: token ids,
positions, block tables and, on a GPU, what the sampler reads. So every rank computes the same step
without knowing requests or the scheduler.
"""

from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tilefleet_worker.attention.base import AttentionBatch, AttentionRow
from tilefleet_worker.batch import Batch
from tilefleet_worker.request_table import SAMPLER
from tilefleet_worker.step_arrays import StepArrays

Words = npt.NDArray[np.int32]


class RankRunner(Protocol):
    """What computes what a rank is told."""

    def follow(self, kind: "Kind", words: Words) -> None:
        """Act on a message. Raises what the framework raises, which ends the group."""
        ...


class Kind(IntEnum):
    """The first word of a message."""

    STEP = 1
    """Compute a step."""
    SCRUB = 2
    """Clean blocks that a faulty request leaves: their numbers."""
    CAPTURE = 3
    """Capture the graphs."""
    LOAD = 4
    """Load a model: JSON, see rank_process."""
    STOP = 5
    """End."""


def joined(parts: Sequence[object]) -> Words:
    """Parts one behind the other, after the length of each."""
    arrays = [np.asarray(part, np.int32).reshape(-1) for part in parts]
    return np.concatenate([np.array([len(array) for array in arrays], np.int32), *arrays])


def split(words: Words, count: int) -> list[Words]:
    """The parts that `joined` made one array of."""
    ends = list(accumulate(words[:count].tolist(), initial=count))
    return [words[start:end] for start, end in pairwise(ends)]


def from_batch(batch: Batch) -> Words:
    """A step of the cpu backends."""
    rows = batch.attention[0].rows
    parts: list[object] = [
        batch.token_ids.numpy(),
        batch.positions.numpy(),
        batch.last_tokens.numpy(),
        [row.start for row in rows],
        [row.length for row in rows],
    ]
    for group in batch.attention:
        parts.append(group.slots.numpy())
        parts.append([len(row.block_ids) for row in group.rows])
        parts.append([block for row in group.rows for block in row.block_ids])
    return joined([[len(parts)], joined(parts)])


def to_batch(words: Words) -> Batch:
    """The step of `from_batch`, without the requests behind its rows."""
    (count,), inner = split(words, 2)
    token_ids, positions, last_tokens, starts, lengths, *groups = split(inner, int(count))
    offsets = list(accumulate(lengths.tolist(), initial=0))
    attention = []
    for slots, widths, blocks in zip(*(iter(groups),) * 3, strict=True):
        ends = list(accumulate(widths.tolist(), initial=0))
        tables = [tuple(blocks[a:b].tolist()) for a, b in pairwise(ends)]
        rows = tuple(
            AttentionRow(offset, start, start + length, table)
            for offset, start, length, table in zip(
                offsets[:-1], starts.tolist(), lengths.tolist(), tables, strict=True
            )
        )
        attention.append(AttentionBatch(rows, _long(slots)))
    return Batch(_long(token_ids), _long(positions), tuple(attention), (), _long(last_tokens))


def from_arrays(arrays: StepArrays) -> Words:
    """A step of a GPU."""
    index = arrays.logits_index
    return joined(
        [
            [arrays.num_decodes, arrays.block_table.shape[1], index is not None],
            arrays.token_ids,
            arrays.positions,
            arrays.slots,
            arrays.context_lens,
            arrays.lengths,
            arrays.block_table,
            [] if index is None else index,
            np.ascontiguousarray(arrays.samples).view(np.int32),
        ]
    )


def to_arrays(words: Words) -> StepArrays:
    """The step of `from_arrays`; which request a row is of is not known here."""
    head, token_ids, positions, slots, contexts, lengths, table, index, samples = split(words, 9)
    num_decodes, width, has_index = head.tolist()
    return StepArrays(
        order=None,
        num_decodes=num_decodes,
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        context_lens=contexts,
        lengths=lengths,
        block_table=table.reshape(len(contexts), width),
        logits_index=index if has_index else None,
        samples=np.frombuffer(samples.tobytes(), SAMPLER),
        sampled=np.zeros(0, np.int64),
    )


def _long(words: Words) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.int64))
