"""What a fleet's load is, computed from the polls of its replicas.

Rates count arrivals, because completions stop rising exactly when more replicas are needed. A
replica's restart, end or late first answer never shows as load. Does not know limits or wishes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from tilefleet_operator.observed import History, WorkerStats

FAST_SECONDS = 10.0
# A burst must stand out of Poisson noise: three standard deviations of the fast window's count.
BURST_ARRIVALS, BURST_SIGMAS = 8, 3.0
# Observed capacity: newest counts most; below 4 s of evidence or after 120 s the model is better.
SATURATED_HALF_LIFE, SATURATED_MIN_SECONDS, SATURATED_MAX_AGE = 30.0, 4.0, 120.0
FULL_SHARE = 0.9
# A request that waits this long met a full replica, not merely the step that was under way.
FULL_WAIT_SECONDS = 0.5


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


_COUNTERS = (
    "arrivals",
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "generated_tokens",
    "completions",
    "aborts",
)


def series(history: History) -> Series:
    """Running totals over the history. A process that began within it counts from zero."""
    totals: list[dict[str, float]] = []
    start = history.frames[0].time if history.frames else 0.0
    seen: dict[str, WorkerStats] = {}
    sums = dict.fromkeys(_COUNTERS, 0.0)
    for frame in history.frames:
        for uid, sample in frame.samples.items():
            for key in _COUNTERS:
                fresh = sample.uptime_seconds < frame.time - start
                sums[key] += _growth(key, seen.get(uid), sample, fresh=fresh)
            seen[uid] = sample
        running = float(sum(s.gauges.running for s in frame.samples.values()))
        totals.append(sums | {"running": running})
    return Series(tuple(f.time for f in history.frames), tuple(totals))


def _growth(key: str, before: WorkerStats | None, sample: WorkerStats, *, fresh: bool) -> float:
    value = float(getattr(sample.counters, key))
    if before is None:
        # A new leader's first answer of an old process holds totals of hours: no load of now.
        return value if fresh else 0.0
    old = float(getattr(before.counters, key))
    return value - old if value >= old else value


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
    for before, after in pairwise(history.frames):
        age, elapsed = now - after.time, after.time - before.time
        if age > SATURATED_MAX_AGE or elapsed <= 0:
            continue
        weight = 0.5 ** (age / SATURATED_HALF_LIFE)
        for uid, sample in after.samples.items():
            old = before.samples.get(uid)
            if old is not None and _full(old) and _full(sample):
                tokens += weight * _tokens_between(old, sample)
                time += weight * elapsed
                evidence += elapsed
    return tokens / time if evidence >= SATURATED_MIN_SECONDS and tokens > 0 else None


def _full(sample: WorkerStats) -> bool:
    gauges = sample.gauges
    limit = FULL_SHARE * gauges.max_concurrent if gauges.max_concurrent else math.inf
    waits = gauges.waiting > 0 and gauges.oldest_wait_seconds > FULL_WAIT_SECONDS
    return waits or gauges.running >= limit


def _tokens_between(before: WorkerStats, after: WorkerStats) -> float:
    keys = ("prompt_tokens_computed", "generated_tokens")
    return sum(_growth(key, before, after, fresh=True) for key in keys)
