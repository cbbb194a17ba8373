"""What a fleet's load is, computed from the polls of its replicas.

Rates count arrivals, because completions stop rising exactly when more replicas are needed. Does
not know limits or wishes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from tilefleet_operator.polls import History

FAST_SECONDS = 10.0
# A burst must stand out of Poisson noise: three standard deviations of the fast window's count.
BURST_ARRIVALS, BURST_SIGMAS = 8, 3.0
# Observed capacity: newest counts most; below 4 s of evidence or after 120 s the model is better.
SATURATED_HALF_LIFE, SATURATED_MIN_SECONDS, SATURATED_MAX_AGE = 30.0, 4.0, 120.0


@dataclass(frozen=True)
class Mix:
    """Mean tokens of one request: prompt computed, prompt cached, output."""

    computed: float
    cached: float
    output: float

    @property
    def tokens(self) -> float:
        """Tokens that one request costs the engine."""
        return self.computed + self.output


@dataclass(frozen=True)
class Series:
    """Fleet-wide running totals, one entry a frame; a pod's restart or end never lowers them."""

    times: tuple[float, ...]
    totals: tuple[Mapping[str, float], ...]

    def delta(self, key: str, start: float, end: float) -> tuple[float, float]:
        """Growth of a total between the frames nearest before start and end, and their distance."""
        if not self.times:
            return 0.0, 0.0
        first = max(0, bisect_right(self.times, start) - 1)
        last = max(0, bisect_right(self.times, end) - 1)
        growth = self.totals[last][key] - self.totals[first][key]
        return growth, self.times[last] - self.times[first]

    def rate(self, key: str, end: float, window: float) -> float:
        """Growth per second over a window, or over the time known when that is shorter.

        A time known of less than FAST_SECONDS counts as FAST_SECONDS: two arrivals in the first
        two seconds are no rate.
        """
        growth, elapsed = self.delta(key, end - window, end)
        return growth / max(elapsed, FAST_SECONDS)


def series(history: History) -> Series:
    """The history's running totals."""
    frames = history.frames
    return Series(tuple(f.time for f in frames), tuple(f.totals for f in frames))


def arrival_rate(totals: Series, end: float, slow: float) -> float:
    """Requests per second at a time: slow mean, or the fast one when it shows a burst."""
    steady, quick = totals.rate("arrivals", end, slow), totals.rate("arrivals", end, FAST_SECONDS)
    count, _ = totals.delta("arrivals", end - FAST_SECONDS, end)
    burst = count >= BURST_ARRIVALS and quick > steady * (1 + BURST_SIGMAS / math.sqrt(count))
    return quick if burst else steady


def request_mix(totals: Series, now: float, slow: float) -> Mix | None:
    """Mean request of the slow window, or of the whole history while fewer than 8 have ended.

    A request still running counts as started for its prompt and as half done for its output.
    """
    for start in (now - slow, -math.inf):
        done = sum(totals.delta(key, start, now)[0] for key in ("completions", "aborts"))
        running, _ = totals.delta("running", start, now)
        if done < BURST_ARRIVALS and start > -math.inf:
            continue
        started, finished = done + max(0.0, running), done + max(0.0, running) / 2
        if started < 1:
            return None
        computed, cached, output = (
            totals.delta(key, start, now)[0]
            for key in ("prompt_tokens_computed", "prompt_tokens_cached", "generated_tokens")
        )
        mix = Mix(computed / started, cached / started, output / finished)
        return mix if mix.tokens > 0 else None
    return None


def saturated_capacity(history: History, now: float) -> float | None:
    """Mean tok/s of one replica while it was full, newest first; None with too little evidence.

    Full between two polls: at both, requests waited long or nine tenths of maxConcurrent ran.
    """
    tokens = time = evidence = 0.0
    for frame in reversed(history.frames):
        age = now - frame.time
        if age > SATURATED_MAX_AGE:
            break
        weight = 0.5 ** (age / SATURATED_HALF_LIFE)
        tokens += weight * frame.full_tokens
        time += weight * frame.full_seconds
        evidence += frame.full_seconds
    return tokens / time if evidence >= SATURATED_MIN_SECONDS and tokens > 0 else None
