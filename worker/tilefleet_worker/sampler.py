"""From logits to a token, row by row: a row's token never depends on the other rows."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tilefleet_worker.request import SamplingParams
from tilefleet_worker.step import StepResult, StepRow

Floats = npt.NDArray[np.float64]

# Nucleus sampling needs the most likely tokens first. They are nearly always among so few that
# sorting a whole vocabulary (10 ms for 150,000 tokens) would be waste.
_FIRST_CANDIDATES = 1024


def sample(logits: torch.Tensor, rows: Sequence[StepRow]) -> StepResult:
    """Choose a token for each row of fp32 logits [rows, vocabulary], which may be changed.

    A row whose logits are not finite gets a fault instead: it must not end the others.
    """
    tokens: dict[str, int] = {}
    faults: dict[str, str] = {}
    highest, best = (part.tolist() for part in logits.max(dim=-1))
    for index, row in enumerate(rows):
        if not np.isfinite(highest[index]):
            faults[row.request_id] = (
                f"the model's logits are not finite at position {row.end} ({highest[index]})"
            )
        elif row.params.temperature == 0.0 and not row.banned_token_ids:
            tokens[row.request_id] = best[index]
        else:
            values = logits[index].double().numpy()
            tokens[row.request_id] = choose(
                values, row.params, row.seed, row.end, row.banned_token_ids
            )
    return StepResult(tokens, faults)


def choose(
    logits: Floats,
    params: SamplingParams,
    seed: int,
    position: int,
    banned_token_ids: Sequence[int] = (),
) -> int:
    """Choose a token from fp64 logits [vocabulary], which are changed.

    The random number is keyed by (seed, position) and used once: the same request draws the same
    numbers whatever runs beside it, and also after a preemption.
    """
    for token in banned_token_ids:
        if 0 <= token < len(logits):
            logits[token] = -np.inf
    if params.temperature == 0.0:
        return int(logits.argmax())
    logits -= logits.max()
    logits /= params.temperature
    candidates, weights = _candidates(logits, params)
    threshold = _uniform(seed, position) * weights.sum()
    chosen = int(np.searchsorted(np.cumsum(weights), threshold, side="right"))
    chosen = min(chosen, len(weights) - 1)
    return chosen if candidates is None else int(candidates[chosen])


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on these two alone (Philox, Salmon et al., 2011)."""
    key = np.array([seed, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _candidates(
    logits: Floats, params: SamplingParams
) -> tuple[npt.NDArray[np.int64] | None, Floats]:
    """Token ids that may be chosen, most likely first, and their weights. None: all, by id."""
    weights = np.exp(logits)
    limit = min(params.top_k or len(logits), len(logits))
    if params.top_p == 1.0 and limit == len(logits):
        return None, weights
    total = float(weights.sum()) if limit == len(logits) else None
    count = min(limit, _FIRST_CANDIDATES)
    while True:
        order = _most_likely(weights, count)
        kept = weights[order]
        if count == limit:
            total = float(kept.sum()) if total is None else total
        if total is not None:
            reached = int(np.searchsorted(np.cumsum(kept), params.top_p * total)) + 1
            if reached <= count or count == limit:
                return order[:reached], kept[:reached]
        count = limit


def _most_likely(weights: Floats, count: int) -> npt.NDArray[np.int64]:
    """Ids of the `count` largest weights, largest first, equal ones by id."""
    if count < len(weights):
        smallest = np.partition(weights, len(weights) - count)[len(weights) - count]
        ids = np.flatnonzero(weights >= smallest)
    else:
        ids = np.arange(len(weights))
    return ids[np.argsort(-weights[ids], kind="stable")][:count]
