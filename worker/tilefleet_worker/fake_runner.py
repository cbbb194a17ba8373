"""A fake runner: no model, tokens from a formula. For tests and for load without a device."""

import time
from collections.abc import Sequence

import numpy as np

from tilefleet_worker.choice import Floats, choose, score
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.request import TokenLogprob
from tilefleet_worker.step import StepPlan, StepResult, StepRow


class FakeRunner:
    """Has the runner's signature. The next token depends on the last token and its position only.

    step_seconds: how long each step pretends to take. fault_token_id: a row that contains this
    token makes the step raise, as a poisoned request would.
    """

    def __init__(
        self, vocab_size: int = 256, step_seconds: float = 0.0, fault_token_id: int | None = None
    ) -> None:
        self._vocab_size = vocab_size
        self._step_seconds = step_seconds
        self._fault_token_id = fault_token_id

    def run(self, plan: StepPlan) -> StepResult:
        """Return a token for every row that wants one. Raises ValueError on the fault token."""
        if self._step_seconds:
            time.sleep(self._step_seconds)
        for row in plan.rows:
            if self._fault_token_id in row.token_ids:
                raise ValueError(f"token {self._fault_token_id} is poison")
        tokens: dict[str, int] = {}
        accepted: dict[str, tuple[int, ...]] = {}
        faults: dict[str, str] = {}
        logprobs: dict[str, TokenLogprob] = {}
        for row in plan.rows:
            if not row.sample:
                continue
            try:
                token = tokens[row.request_id] = self._token(row)
            except ValueError as error:
                faults[row.request_id] = f"{type(error).__name__}: {error}"
                continue
            accepted[row.request_id] = self._accepted(row, token)
            if row.params.logprobs is not None:
                values = self._logits(row.token_ids[-1], row.end)
                logprobs[row.request_id] = score(values, token, row.params.logprobs)
        return StepResult(tokens, faults, logprobs, self._scores(plan), accepted)

    def _accepted(self, row: StepRow, token: int) -> tuple[int, ...]:
        found: list[int] = []
        for draft in row.drafts:
            if token != draft:
                break
            token = self._next(token, row.end + len(found) + 1)
            found.append(token)
        return tuple(found)

    def _scores(self, plan: StepPlan) -> dict[str, tuple[TokenLogprob, ...]]:
        scored = {}
        for row in (row for row in plan.rows if row.targets):
            num_top = row.params.prompt_logprobs or 0
            scored[row.request_id] = tuple(
                score(self._logits(token, row.start + index + 1), row.targets[index], num_top)
                for index, token in enumerate(row.token_ids[: len(row.targets)])
            )
        return scored

    def check(self) -> None:
        """The fake device is always healthy."""

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """It keeps nothing in blocks, so there is nothing to copy."""

    def _token(self, row: StepRow) -> int:
        """The formula's token, as if it had all the probability, unless something reshapes it."""
        if row.params.reshapes or row.constraint is not None:
            return choose(self._logits(row.token_ids[-1], row.end), row)
        token = self._next(row.token_ids[row.length - len(row.drafts) - 1], row.end)
        while token in row.banned_token_ids:
            token = (token + 1) % self._vocab_size
        return token

    def _next(self, last: int, end: int) -> int:
        return (last * 31 + end * 7 + 3) % self._vocab_size

    def _logits(self, last: int, end: int) -> Floats:
        """Logits [vocabulary]: highest at the formula's token, lower the further behind it."""
        behind = (np.arange(self._vocab_size) - self._next(last, end)) % self._vocab_size
        return -0.05 * behind.astype(np.float64)
