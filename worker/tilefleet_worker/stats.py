"""What the engine counts about itself, as one immutable value."""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tilefleet_worker.accounting import EMPTY_POOL, PoolBytes
from tilefleet_worker.step import StepPlan


@dataclass(frozen=True, slots=True)
class StepSample:
    """One finished step: enough to fit a model of step time against its load."""

    seconds: float
    prefill_tokens: int
    """Tokens of rows longer than one: prompts, and recomputed prefixes."""
    sequences: int
    kv_tokens: int
    """Tokens of context that attention read, over all rows."""

    @classmethod
    def of(cls, plan: StepPlan, seconds: float) -> "StepSample":
        """Describe a plan that took `seconds`."""
        lengths = plan.ends - plan.starts  # drafts belong to decodes
        return cls(
            seconds=seconds,
            prefill_tokens=int(lengths[lengths > 1].sum()),
            sequences=len(plan),
            kv_tokens=int(plan.ends.sum()),
        )


MAX_STEP_SAMPLES = 64
STEP_TOKENS: tuple[float, ...] = (
    *(1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    *(4096, 8192, 16384),
)
"""Upper bounds of tokens computed in a step; vLLM's."""
STEP_SECONDS: tuple[float, ...] = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    *(10.0, 30.0),
)


class Histogram:
    """How many observations fell up to each bound, and their sum. One writer, under a lock."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """bounds: upper bounds, rising; above the last one there is one more place."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> "HistogramCounts":
        """The counts so far, as a value."""
        return HistogramCounts(self._bounds, tuple(self._counts), self._sum)


@dataclass(frozen=True, slots=True)
class HistogramCounts:
    """Observations in each range: up to the first bound, up to the second, ..., above the last."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class StepLog:
    """All finished steps: totals, and the newest ones in full. Written under the engine's lock."""

    def __init__(self) -> None:
        self.count = 0
        self.busy_seconds = 0.0
        self._newest: deque[StepSample] = deque(maxlen=MAX_STEP_SAMPLES)
        self._tokens, self._seconds = Histogram(STEP_TOKENS), Histogram(STEP_SECONDS)

    def add(self, plan: StepPlan, seconds: float) -> None:
        """Note a step that took `seconds`."""
        self._newest.append(StepSample.of(plan, seconds))
        self._tokens.observe(int(plan.lengths.sum()))
        self._seconds.observe(seconds)
        self.count += 1
        self.busy_seconds += seconds

    @property
    def newest(self) -> tuple[StepSample, ...]:
        """At most MAX_STEP_SAMPLES, oldest first."""
        return tuple(self._newest)

    @property
    def slowest_seconds(self) -> float:
        """Of the newest; 0 before the first."""
        return max((step.seconds for step in self._newest), default=0.0)

    def histograms(self) -> Mapping[str, HistogramCounts]:
        """step_tokens and step_seconds, of all steps."""
        return {"step_tokens": self._tokens.snapshot(), "step_seconds": self._seconds.snapshot()}


NO_STEPS = StepLog().histograms()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters only grow; gauges are of now; steps are the newest, oldest first."""

    counters: Mapping[str, float]
    gauges: Mapping[str, float]
    steps: tuple[StepSample, ...]
    histograms: Mapping[str, HistogramCounts] = field(default_factory=lambda: NO_STEPS)
    """Of all steps: step_tokens and step_seconds. In the metrics, not in `/stats`."""
    kv: PoolBytes = EMPTY_POOL
    """Bytes of the KV pool by layer kind and cause, as of the last step."""

    def as_dict(self) -> dict[str, Any]:
        """The `counters`, `gauges` and `steps` of `/stats`, ready for JSON."""
        return {
            "counters": dict(self.counters),
            "gauges": dict(self.gauges),
            "steps": [asdict(step) for step in self.steps],
        }


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was decided and measured while the engine started."""

    vocab_size: int
    max_model_len: int
    block_size: int
    eos_token_ids: tuple[int, ...] = ()
    device: Mapping[str, Any] = field(default_factory=dict)
    """kind, name, arch and memory_bytes of the device, as `/stats` reports them."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved options: no auto left."""
    startup: tuple[tuple[str, float], ...] = ()
    """(phase, seconds) in order: weights, pool, warmup."""
