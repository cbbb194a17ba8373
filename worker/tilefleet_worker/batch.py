"""A plan as tensors: the only place where rows of requests become rows of a matrix."""

from dataclasses import dataclass

import numpy as np
import torch

from tilefleet_worker.attention.base import AttentionBatch, AttentionRow
from tilefleet_worker.step import StepPlan, StepRow


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one forward pass over all tokens of a step, in the order of the plan."""

    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    attention: tuple[AttentionBatch, ...]
    """The rows with the blocks and slots of each group of layers, see CacheLayout.tables."""
    sampled: tuple[StepRow, ...]
    """Rows that want logits, in order: each first before its targets, then of its last token and
    of its drafts."""
    last_tokens: torch.Tensor  # int64 [logits]: index of the tokens whose logits are wanted


def build_batch(plan: StepPlan, block_size: int) -> Batch:
    """Lay out a plan. Raises IndexError when a row reaches beyond its blocks."""
    token_ids: list[int] = []
    positions: list[np.ndarray] = []
    last_tokens: list[int] = []
    for row in plan.rows:
        positions.append(np.arange(row.start, row.start + row.length))
        last_tokens.extend(range(len(token_ids), len(token_ids) + len(row.targets)))
        token_ids.extend(row.token_ids)
        if row.sample:
            last_tokens.extend(range(len(token_ids) - 1 - len(row.drafts), len(token_ids)))
    num_tables = len(plan.rows[0].tables) if plan.rows else 1
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(np.concatenate(positions)),
        attention=tuple(
            _attention_batch(plan.rows, positions, group, block_size) for group in range(num_tables)
        ),
        sampled=tuple(row for row in plan.rows if row.num_logits),
        last_tokens=torch.tensor(last_tokens, dtype=torch.int64),
    )


def _attention_batch(
    rows: tuple[StepRow, ...], positions: list[np.ndarray], group: int, block_size: int
) -> AttentionBatch:
    """The rows as the layers of one group see them."""
    offset, made, slots = 0, [], []
    for row, place in zip(rows, positions, strict=True):
        blocks = row.tables[group]
        made.append(AttentionRow(offset, row.start, row.start + row.length, blocks))
        slots.append(np.asarray(blocks)[place // block_size] * block_size + place % block_size)
        offset += row.length
    return AttentionBatch(tuple(made), torch.from_numpy(np.concatenate(slots)))
