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
    attention: AttentionBatch
    sampled: tuple[StepRow, ...]
    """Rows that want logits, in order: each first before its targets, then of its last token."""
    last_tokens: torch.Tensor  # int64 [logits]: index of the tokens whose logits are wanted


def build_batch(plan: StepPlan, block_size: int) -> Batch:
    """Lay out a plan. Raises IndexError when a row reaches beyond its blocks."""
    token_ids: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    rows: list[AttentionRow] = []
    last_tokens: list[int] = []
    for row in plan.rows:
        rows.append(AttentionRow(len(token_ids), row.start, row.end, row.block_ids))
        place = np.arange(row.start, row.end)
        blocks = np.asarray(row.block_ids)[place // block_size]
        positions.append(place)
        slots.append(blocks * block_size + place % block_size)
        last_tokens.extend(range(len(token_ids), len(token_ids) + len(row.targets)))
        token_ids.extend(row.token_ids)
        if row.sample:
            last_tokens.append(len(token_ids) - 1)
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(np.concatenate(positions)),
        attention=AttentionBatch(tuple(rows), torch.from_numpy(np.concatenate(slots))),
        sampled=tuple(row for row in plan.rows if row.num_logits),
        last_tokens=torch.tensor(last_tokens, dtype=torch.int64),
    )
