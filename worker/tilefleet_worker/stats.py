"""What the engine counts about itself, as one immutable value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

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
        return cls(
            seconds=seconds,
            prefill_tokens=int(plan.lengths[plan.lengths > 1].sum()),
            sequences=len(plan),
            kv_tokens=int(plan.ends.sum()),
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters only grow; gauges are of now; steps are the newest, oldest first."""

    counters: Mapping[str, float]
    gauges: Mapping[str, float]
    steps: tuple[StepSample, ...]

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
