"""A fake runner: no model, tokens from a formula. For tests and for load without a device."""

import time

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
        return StepResult({row.request_id: self._token(row) for row in plan.rows if row.sample})

    def check(self) -> None:
        """The fake device is always healthy."""

    def _token(self, row: StepRow) -> int:
        token = (row.token_ids[-1] * 31 + row.end * 7 + 3) % self._vocab_size
        while token in row.banned_token_ids:
            token = (token + 1) % self._vocab_size
        return token
