"""A token bucket: so many things a second, so many at once after a quiet time.

It sleeps for nobody: it says how long to wait.
"""

import time
from collections.abc import Callable


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

    def take(self) -> float:
        """Take one token, in advance if there is none; returns the seconds to wait for it."""
        wait = self.wait_seconds()
        self._tokens -= 1
        return max(0.0, wait)
