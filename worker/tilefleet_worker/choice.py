"""From the logits of one row to its token, in fp64: never looks at another row.

The order of vLLM: masks and bias, penalties, temperature, min-p, top-k and top-p. Knows no device.
"""

import numpy as np
import numpy.typing as npt

from tilefleet_worker.history import TokenHistory
from tilefleet_worker.request import SamplingParams, TokenLogprob
from tilefleet_worker.step import StepRow

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# Nucleus sampling needs the most likely tokens first. They are nearly always among so few that
# sorting a whole vocabulary (10 ms for 150,000 tokens) would be waste.
_FIRST_CANDIDATES = 1024
# JSON has no -inf; vLLM reports impossible tokens like this too.
LOWEST_LOGPROB = -9999.0


class NoTokenError(ValueError):
    """Masks, bias and grammar together leave no token that could be chosen."""


def needs_choice(row: StepRow) -> bool:
    """False when the row's token is just the likeliest one."""
    params = row.params
    return (
        params.temperature > 0.0
        or params.reshapes
        or bool(row.banned_token_ids)
        or row.constraint is not None
    )


def choose(logits: Floats, row: StepRow, ahead: int = 0) -> int:
    """Choose the row's token from fp64 logits [vocabulary], which are changed.

    ahead: how many of its drafts stand before the token. Raises NoTokenError when nothing is left
    to choose, and ValueError when the grammar is broken.
    """
    _mask(logits, row)
    if row.history is not None:
        _penalise(logits, row.params, row.history)
    if not np.isfinite(logits.max()):
        raise NoTokenError("masks, bias and grammar together leave no token to choose")
    return draw(logits, row.params, row.seed, row.end + ahead)


def _mask(logits: Floats, row: StepRow) -> None:
    """Take out what must not come, and add the bias."""
    params = row.params
    if row.constraint is not None:
        logits[~row.constraint.allowed()[: len(logits)]] = -np.inf
    if params.allowed_token_ids:
        kept = list(params.allowed_token_ids)
        values = logits[kept]
        logits.fill(-np.inf)
        logits[kept] = values
    for word in params.bad_words:
        if row.history is not None and row.history.ends_with(word[:-1]):
            logits[word[-1]] = -np.inf
    for token in row.banned_token_ids:
        if 0 <= token < len(logits):
            logits[token] = -np.inf
    for token, bias in params.logit_bias:
        logits[token] += bias


def _penalise(logits: Floats, params: SamplingParams, history: TokenHistory) -> None:
    if params.repetition_penalty != 1.0:
        seen = history.seen()
        values = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = np.where(values > 0, values / factor, values * factor)
    if params.frequency_penalty or params.presence_penalty:
        ids, counts = history.generated()
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty


def draw(logits: Floats, params: SamplingParams, seed: int, position: int) -> int:
    """Draw a token from fp64 logits [vocabulary], which are changed.

    The random number is keyed by (seed, position) and used once: the same request draws the same
    numbers whatever runs beside it, and also after a preemption.
    """
    if params.temperature == 0.0:
        return int(logits.argmax())
    logits -= logits.max()
    logits /= params.temperature
    candidates, weights = _candidates(logits, params)
    sums = np.cumsum(weights)
    chosen = int(np.searchsorted(sums, _uniform(seed, position) * sums[-1], side="right"))
    if chosen >= len(weights):  # rounding: the last one that is possible
        chosen = int(np.flatnonzero(weights)[-1])
    return chosen if candidates is None else int(candidates[chosen])


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on these two alone (Philox, Salmon et al., 2011)."""
    key = np.array([seed, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _candidates(logits: Floats, params: SamplingParams) -> tuple[Ids | None, Floats]:
    """Token ids that may be chosen, most likely first, and their weights. None: all, by id."""
    weights = np.exp(logits)
    if params.min_p:
        weights[weights < params.min_p] = 0.0
    limit = min(params.top_k or len(logits), len(logits))
    if params.top_p == 1.0 and limit == len(logits):
        return None, weights
    total = float(weights.sum()) if limit == len(logits) else None
    count = min(limit, _FIRST_CANDIDATES)
    while True:
        order = most_likely(weights, count)
        kept = weights[order]
        if count == limit:
            total = float(kept.sum()) if total is None else total
        if total is not None:
            reached = int(np.searchsorted(np.cumsum(kept), params.top_p * total)) + 1
            if reached <= count or count == limit:
                return order[:reached], kept[:reached]
        count = limit


def most_likely(weights: Floats, count: int) -> Ids:
    """Ids of the `count` largest weights, largest first, equal ones by id."""
    if count < len(weights):
        smallest = np.partition(weights, len(weights) - count)[len(weights) - count]
        ids = np.flatnonzero(weights >= smallest)
    else:
        ids = np.arange(len(weights))
    return ids[np.argsort(-weights[ids], kind="stable")][:count]


def score(logits: Floats, token_id: int, num_top: int) -> TokenLogprob:
    """Log probability of a token under fp64 logits [vocabulary], and those of the best ones."""
    highest = logits.max()
    total = highest + np.log(np.exp(logits - highest).sum())

    def logprob(token: int) -> float:
        return max(LOWEST_LOGPROB, float(logits[token] - total))

    top = [int(token) for token in most_likely(logits, num_top)] if num_top else []
    return TokenLogprob(
        token_id=token_id,
        logprob=logprob(token_id),
        rank=int((logits > logits[token_id]).sum()) + 1,
        top=tuple((token, logprob(token)) for token in top),
    )
