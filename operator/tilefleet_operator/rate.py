"""A token bucket: so many things a second, so many at once after a quiet time.

It sleeps for nobody: it says how long to wait.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tilefleet_operator.errors import ConfigInvalid


@dataclass(frozen=True, slots=True)
class Rate:
    """How much of something is allowed. Raises ConfigInvalid for a rate that lets nothing pass."""

    per_second: float
    burst: int

    def __post_init__(self) -> None:
        if self.per_second <= 0 or self.burst < 1:
            raise ConfigInvalid(
                f"{self.per_second:g} a second with a burst of {self.burst} lets nothing pass;"
                " give a rate above 0 and a burst of at least 1"
            )


class TokenBucket:
    """Tokens flow in at ``per_second`` up to ``burst``."""

    def __init__(
        self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_second, self.burst, self.clock = per_second, burst, clock
        self._tokens, self._filled = float(burst), clock()

    def wait_seconds(self) -> float:
        """Seconds until a token is there; <= 0 when one is there now."""
        now = self.clock()
        self._tokens = min(self.burst, self._tokens + (now - self._filled) * self.per_second)
        self._filled = now
        return (1 - self._tokens) / self.per_second

    def pause(self, seconds: float) -> None:
        """Hand out nothing for ``seconds`` from now on: who gives the tokens is overloaded."""
        self.wait_seconds()
        self._tokens = min(self._tokens, 1 - seconds * self.per_second)

    def take(self) -> float:
        """Take one token, in advance if there is none; returns the seconds to wait for it."""
        wait = self.wait_seconds()
        self._tokens -= 1
        return max(0.0, wait)
