"""The polls of one fleet, added up as they come, so that a decision never walks them again.

A poll becomes one Frame of running totals; the answers themselves are kept only once, the newest of
each replica. Knows no clock and no meaning of the numbers beyond growth and fullness.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tilefleet_operator.stats import MissingStats, Step, WorkerStats

# Longer than the longest scale-down window that the schema allows.
HISTORY_SECONDS = 660.0
STEPS_KEPT = 256
STEPS_PER_SAMPLE = 8
# A fleet of fixed size is asked this often: its load is shown and chooses victims, no more.
CALM_POLL_SECONDS = 10.0
FULL_SHARE = 0.9
# A request that waits this long met a full replica, not merely the step that was under way.
FULL_WAIT_SECONDS = 0.5
COUNTERS = (
    "arrivals",
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "generated_tokens",
    "completions",
    "aborts",
)
_Answers = Mapping[str, WorkerStats]


@dataclass(frozen=True)
class Frame:
    """One poll. time: seconds since the epoch. replicas: number of answers.

    totals: running totals over the fleet, from COUNTERS, and the requests `running` now; a pod's
    restart or end never lowers a total. full_tokens, full_seconds: tokens made, and replica-seconds
    spent, by replicas that were full at this poll and the one before.
    """

    time: float
    replicas: int
    totals: Mapping[str, float]
    full_tokens: float = 0.0
    full_seconds: float = 0.0


@dataclass(frozen=True)
class History:
    """Polls of the last HISTORY_SECONDS, oldest first, and a thinned reservoir of steps.

    latest: pod UID → answer of the newest poll. known: pod UID → (time, answer) of the newest
    answer ever, for HISTORY_SECONDS.
    """

    frames: tuple[Frame, ...] = ()
    steps: tuple[Step, ...] = ()
    latest: _Answers = field(default_factory=dict)
    known: Mapping[str, tuple[float, WorkerStats]] = field(default_factory=dict)

    def add(self, now: float, stats: Mapping[str, WorkerStats | MissingStats]) -> History:
        """A new history with one more poll; missing answers leave a gap. Does not mutate."""
        present = {
            uid: sample for uid, sample in sorted(stats.items()) if isinstance(sample, WorkerStats)
        }
        fresh: list[Step] = []
        for uid, sample in present.items():
            fresh += _new_steps(self.latest.get(uid), sample)
        latest = {uid: replace(sample, steps=()) for uid, sample in present.items()}
        first = bisect_left(self.frames, now - HISTORY_SECONDS, key=lambda frame: frame.time)
        kept = self.frames[first : bisect_left(self.frames, now, key=lambda frame: frame.time)]
        known = {
            uid: held for uid, held in self.known.items() if held[0] >= now - HISTORY_SECONDS
        } | {uid: (now, sample) for uid, sample in latest.items()}
        return History(
            (*kept, self._frame(now, kept, latest)),
            (*self.steps, *fresh)[-STEPS_KEPT:],
            latest,
            known,
        )

    def _frame(self, now: float, kept: tuple[Frame, ...], latest: _Answers) -> Frame:
        last = self.frames[-1] if self.frames else None
        start = kept[0].time if kept else now
        totals = dict(last.totals) if last is not None else dict.fromkeys(COUNTERS, 0.0)
        full_tokens = full_seconds = 0.0
        for uid, sample in latest.items():
            before = self.known[uid][1] if uid in self.known else None
            # A new leader's first answer of an old process holds totals of hours: no load of now.
            counted = before is not None or sample.uptime_seconds < now - start
            for key in COUNTERS:
                totals[key] += _growth(key, before, sample) if counted else 0.0
            old = self.latest.get(uid)
            if old is not None and last is not None and _full(old) and _full(sample):
                keys = ("prompt_tokens_computed", "generated_tokens")
                full_tokens += sum(_growth(key, old, sample) for key in keys)
                full_seconds += now - last.time
        totals["running"] = float(sum(sample.gauges.running for sample in latest.values()))
        return Frame(now, len(latest), totals, full_tokens, full_seconds)


def _growth(key: str, before: WorkerStats | None, sample: WorkerStats) -> float:
    """Growth of a counter; all of it when the process is new or began anew."""
    value = float(getattr(sample.counters, key))
    old = float(getattr(before.counters, key)) if before is not None else 0.0
    return value - old if value >= old else value


def _full(sample: WorkerStats) -> bool:
    gauges = sample.gauges
    limit = FULL_SHARE * gauges.max_concurrent if gauges.max_concurrent else math.inf
    waits = gauges.waiting > 0 and gauges.oldest_wait_seconds > FULL_WAIT_SECONDS
    return waits or gauges.running >= limit


def _new_steps(before: WorkerStats | None, sample: WorkerStats) -> tuple[Step, ...]:
    """Steps not seen in the poll before, thinned evenly to STEPS_PER_SAMPLE."""
    count = sample.counters.steps
    if before is not None and before.counters.steps <= count:
        count -= before.counters.steps
    fresh = sample.steps[-count:] if count > 0 else ()
    stride = max(1, -(-len(fresh) // STEPS_PER_SAMPLE))
    return fresh[::-1][::stride][::-1]
