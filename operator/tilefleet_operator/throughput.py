"""How long an engine step takes, and what one replica can therefore carry.

    tau = a + b p + c N + d K        seconds of one step; p prefill tokens, N sequences, K KV tokens
    S   = b I + O (c + d (I + Ic + O/2))               work of one request, busy replica-seconds

In steady state at rate r, Little's law gives N = r O tau and K = r O tau (I + Ic + O/2); so the
busy share is u = r S and tau = a / (1 - u). KV memory and the number of concurrent sequences each
cap u. Does not know where steps come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilefleet_operator.observed import Step

# Typical sizes, so that the four unknowns of the fit have the same order of magnitude.
_SCALES = (1.0, 8192.0, 256.0, 100_000.0)
_RIDGE = 1e-6
MIN_STEPS = 32
KV_USABLE = 0.9


@dataclass(frozen=True)
class StepModel:
    """Coefficients of the duration of a step: s, s/token, s/sequence, s/KV token; none negative."""

    a: float
    b: float
    c: float
    d: float

    def work(self, computed: float, cached: float, output: float) -> float:
        """Busy replica-seconds of one request (S). Arguments in tokens."""
        return self.b * computed + output * (
            self.c + self.d * self.context(computed, cached, output)
        )

    def context(self, computed: float, cached: float, output: float) -> float:
        """Mean KV tokens that one request holds while it generates."""
        return computed + cached + output / 2

    def kv_limit(self, computed: float, cached: float, output: float, kv_tokens: float) -> float:
        """Largest busy share at which the KV pool still holds all sequences, 0..1."""
        room = KV_USABLE * kv_tokens * self.work(computed, cached, output)
        held = output * self.context(computed, cached, output) * self.a
        return room / (held + room) if held + room > 0 else 1.0

    def batch_limit(
        self, computed: float, cached: float, output: float, max_concurrent: float
    ) -> float:
        """Largest busy share at which no more than max_concurrent sequences run, 0..1."""
        room = max_concurrent * self.work(computed, cached, output)
        return room / (output * self.a + room) if output * self.a + room > 0 else 1.0

    def requests_per_second(
        self,
        computed: float,
        cached: float,
        output: float,
        *,
        kv_tokens: float,
        max_concurrent: float,
    ) -> float | None:
        """Requests per second of one replica at its limit; None when the model knows no cost."""
        work = self.work(computed, cached, output)
        if work <= 0:
            return None
        share = min(
            self.kv_limit(computed, cached, output, kv_tokens),
            self.batch_limit(computed, cached, output, max_concurrent),
        )
        return share / work


def fit_steps(steps: Sequence[Step]) -> StepModel | None:
    """Least squares over steps, coefficients at least 0; None below MIN_STEPS steps.

    A coefficient that comes out negative is dropped and the rest fitted again, so that one
    unobserved dimension cannot distort the others. Steps over 20 times the median are left out:
    they are page faults and other tenants, not the model.
    """
    if len(steps) < MIN_STEPS:
        return None
    median = sorted(step.seconds for step in steps)[len(steps) // 2]
    kept = [step for step in steps if step.seconds <= 20 * median]
    active = [0, 1, 2, 3]
    while active:
        theta = _solve_normal(kept, active)
        negative = [index for index in active if theta[index] < 0]
        if not negative:
            a, b, c, d = (value / scale for value, scale in zip(theta, _SCALES, strict=True))
            return StepModel(a, b, c, d)
        active.remove(min(negative, key=lambda index: theta[index]))
    return None


def _solve_normal(steps: Sequence[Step], active: Sequence[int]) -> list[float]:
    """Scaled coefficients of the active columns, 0 elsewhere."""
    size = len(active)
    matrix = [[_RIDGE if i == j else 0.0 for j in range(size)] for i in range(size)]
    right = [0.0] * size
    for step in steps:
        row = (1.0, step.prefill_tokens, step.sequences, step.kv_tokens)
        x = [row[index] / _SCALES[index] for index in active]
        for i in range(size):
            right[i] += x[i] * step.seconds
            for j in range(size):
                matrix[i][j] += x[i] * x[j]
    solution = _gauss(matrix, right)
    theta = [0.0] * len(_SCALES)
    for index, value in zip(active, solution, strict=True):
        theta[index] = value
    return theta


def _gauss(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solution of a small positive definite system; mutates its arguments."""
    size = len(right)
    for column in range(size):
        pivot = max(range(column, size), key=lambda r: abs(matrix[r][column]))
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        right[column], right[pivot] = right[pivot], right[column]
        for row in range(column + 1, size):
            factor = matrix[row][column] / matrix[column][column]
            right[row] -= factor * right[column]
            for k in range(column, size):
                matrix[row][k] -= factor * matrix[column][k]
    solution = [0.0] * size
    for row in range(size - 1, -1, -1):
        known = sum(matrix[row][k] * solution[k] for k in range(row + 1, size))
        solution[row] = (right[row] - known) / matrix[row][row]
    return solution
