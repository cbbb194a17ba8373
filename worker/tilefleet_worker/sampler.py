"""From the logits of a step to its tokens, row by row: no row depends on another one."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from tilefleet_worker.choice import Floats, choose, needs_choice, score
from tilefleet_worker.request import TokenLogprob
from tilefleet_worker.step import StepResult, StepRow


def sample(logits: torch.Tensor, rows: Sequence[StepRow]) -> StepResult:
    """Choose a token for each row that wants one, and score the targets of each row.

    logits: fp32 [sum of the rows' num_logits, vocabulary], in the order of the rows: first those
    of the targets, then those of the next token and at each draft. Whatever goes wrong with a row
    (logits that are not finite, a grammar that cannot go on) becomes its fault: it must not end the
    others.
    """
    tokens: dict[str, int] = {}
    accepted: dict[str, tuple[int, ...]] = {}
    faults: dict[str, str] = {}
    logprobs: dict[str, TokenLogprob] = {}
    scored: dict[str, tuple[TokenLogprob, ...]] = {}
    highest, best = (part.tolist() for part in logits.max(dim=-1))
    for row, first in _places(rows):
        place = first + len(row.targets)
        end = first + row.num_logits
        needed = highest[first : end - len(row.drafts)]
        if not np.isfinite(needed).all():
            faults[row.request_id] = (
                f"the model's logits are not finite at position {row.end} ({needed[-1]})"
            )
            continue
        try:
            if row.targets:
                num_top = row.params.prompt_logprobs or 0
                scored[row.request_id] = tuple(
                    score(_values(logits[first + index]), target, num_top)
                    for index, target in enumerate(row.targets)
                )
            if row.sample:
                token = _token(logits[place], row, best[place])
                tokens[row.request_id] = token
                if row.drafts:
                    part = slice(place + 1, end)
                    found = _accepted(logits[part], row, token, best[part], highest[part])
                    accepted[row.request_id] = found
                if row.params.logprobs is not None:
                    values = _values(logits[place])
                    logprobs[row.request_id] = score(values, token, row.params.logprobs)
        except Exception as error:
            tokens.pop(row.request_id, None)
            faults[row.request_id] = f"{type(error).__name__}: {error}"
    return StepResult(tokens, faults, logprobs, scored, accepted)


def _places(rows: Sequence[StepRow]) -> Iterator[tuple[StepRow, int]]:
    """Each row with the index of its first logits."""
    first = 0
    for row in rows:
        yield row, first
        first += row.num_logits


def _token(logits: torch.Tensor, row: StepRow, best: int, ahead: int = 0) -> int:
    return choose(_values(logits), row, ahead) if needs_choice(row) else best


def _accepted(
    logits: torch.Tensor, row: StepRow, token: int, best: list[int], highest: list[float]
) -> tuple[int, ...]:
    """Tokens behind `token`, as long as each one before was drafted.

    logits, best and highest: at the drafts. Where they are not finite it ends: the next step
    computes that position again, and says so.
    """
    found: list[int] = []
    for ahead, draft in enumerate(row.drafts):
        if token != draft or not np.isfinite(highest[ahead]):
            break
        token = _token(logits[ahead], row, best[ahead], ahead + 1)
        found.append(token)
    return tuple(found)


def _values(logits: torch.Tensor) -> Floats:
    """An fp64 copy on the host."""
    values: Floats = logits.to(device="cpu", dtype=torch.float64, copy=True).numpy()
    return values
