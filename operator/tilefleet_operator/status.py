"""The status: counts, telemetry, decisions and conditions, written only when they say more.

Counts change at once, conditions as condition.py holds them. Telemetry (utilization, capacity,
demand) is rounded, and alone causes a write at most every 30 s and only when it moved by more than
5 %. Messages hold no figure that moves with load. Does not know how any of it was decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.condition import Condition, hold_wait, written
from tilefleet_operator.units import rfc3339, timestamp

TELEMETRY_SECONDS = 30.0
TELEMETRY_CHANGE = 0.05
DECISIONS_KEPT = 10
_TELEMETRY = ("utilization", "capacity", "demand")
_COUNTS = (
    "replicas", "readyReplicas", "updatedReplicas", "pendingReplicas", "drainingReplicas",
    "accelerator",
)  # fmt: skip


@dataclass(frozen=True)
class Telemetry:
    """Measured figures, tokens per second; None while unknown."""

    utilization: float | None = None
    capacity: float | None = None
    source: str = ""
    demand: float | None = None
    queue: float = 0.0


@dataclass(frozen=True)
class Report:
    """Everything that a status is built from. counts: status field → number."""

    generation: int
    counts: Mapping[str, int]
    selector: str
    revision: str
    conditions: Sequence[Condition]
    telemetry: Telemetry = field(default_factory=Telemetry)
    accelerator: Mapping[str, Any] = field(default_factory=dict)
    current_revision: str = ""
    rollout: Mapping[str, Any] = field(default_factory=dict)
    decision_reason: str = ""
    decision_inputs: Mapping[str, str] = field(default_factory=dict)


def build(report: Report, previous: Mapping[str, Any], now: float) -> dict[str, Any]:
    """The whole new status. Equal to `previous` when there is nothing to write. Does not mutate."""
    status: dict[str, Any] = {
        "observedGeneration": report.generation,
        **report.counts,
        "selector": report.selector,
        "currentRevision": report.current_revision,
        "updateRevision": report.revision,
        "decisions": _decisions(report, previous, now),
        "conditions": written(report.conditions, report.generation, previous, now),
    }
    if report.rollout:
        status["rollout"] = dict(report.rollout)
    if report.accelerator:
        status["accelerator"] = dict(report.accelerator)
    fresh = _telemetry(report.telemetry, now)
    kept = {key: previous[key] for key in _TELEMETRY if key in previous}
    rest = {key: value for key, value in previous.items() if key not in _TELEMETRY}
    write = rest != status or _due(kept, fresh, now)
    if write and moved(kept, fresh):
        return status | fresh
    return status | kept


def wait(report: Report, previous: Mapping[str, Any], now: float) -> float | None:
    """Seconds until what is held back may be written: moved telemetry or a condition."""
    waits = [hold_wait(report.conditions, report.generation, previous, now)]
    kept = {key: previous[key] for key in _TELEMETRY if key in previous}
    if moved(kept, _telemetry(report.telemetry, now)):
        waits.append(max(0.0, _sampled(kept) + TELEMETRY_SECONDS - now))
    return min((one for one in waits if one is not None), default=None)


def is_minor(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """True when nothing but counts, figures and words differ: no answer to a spec, no decision, no
    condition that turned. Replicas that start pass several such states within a second."""
    return _gist(before) == _gist(after)


def plans_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """True when the next plan is the same after either: they differ in what no plan reads back.

    That is the generation that is answered, counts, and words of conditions that did not turn.
    """
    return _read_back(before) == _read_back(after)


def _read_back(status: Mapping[str, Any]) -> dict[str, Any]:
    left_out = (*_COUNTS, "conditions", "observedGeneration")
    rest = {key: value for key, value in status.items() if key not in left_out}
    held = status.get("conditions") or []
    return rest | {"": [(one["type"], one["status"], one["lastTransitionTime"]) for one in held]}


def _gist(status: Mapping[str, Any]) -> dict[str, Any]:
    left_out = (*_COUNTS, *_TELEMETRY, "conditions")
    gist = {key: value for key, value in status.items() if key not in left_out}
    held = status.get("conditions") or []
    return gist | {one["type"]: (one["status"], one["observedGeneration"]) for one in held}


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """True when a figure appeared, vanished or changed by more than 5 %."""
    old, new = _figures(before), _figures(after)
    if old.keys() != new.keys():
        return True
    return any(
        abs(new[key] - old[key]) > TELEMETRY_CHANGE * max(abs(old[key]), abs(new[key]))
        for key in new
    )


def _due(kept: Mapping[str, Any], fresh: Mapping[str, Any], now: float) -> bool:
    return moved(kept, fresh) and now - _sampled(kept) >= TELEMETRY_SECONDS


def _sampled(telemetry: Mapping[str, Any]) -> float:
    """Time of the last write of telemetry; the beginning of time without one."""
    text = (telemetry.get("capacity") or {}).get("sampledAt")
    return timestamp(text) if text else 0.0


def _figures(telemetry: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a status by name; small ones count as 0, so that noise at idle is no change."""
    figures: dict[str, float] = {}
    if "utilization" in telemetry:
        figures["utilization"] = _floor(float(telemetry["utilization"]), 0.01)
    capacity = (telemetry.get("capacity") or {}).get("tokensPerSecondPerReplica")
    if capacity is not None:
        figures["capacity"] = float(capacity)
    for key, value in (telemetry.get("demand") or {}).items():
        figures[key] = _floor(float(value), 1.0)
    return figures


def _floor(value: float, smallest: float) -> float:
    return value if value > smallest else 0.0


def _telemetry(telemetry: Telemetry, now: float) -> dict[str, Any]:
    """Status fields of the known figures, rounded to what a reader can use."""
    result: dict[str, Any] = {}
    if telemetry.utilization is not None:
        result["utilization"] = f"{telemetry.utilization:.2f}"
    if telemetry.demand is not None:
        result["demand"] = {
            "tokensPerSecond": round(telemetry.demand),
            "queueTokens": round(telemetry.queue),
        }
    capacity: dict[str, Any] = {}
    if telemetry.capacity is not None:
        capacity = {
            "tokensPerSecondPerReplica": round(telemetry.capacity),
            "source": telemetry.source,
        }
    if result or capacity:
        result["capacity"] = capacity | {"sampledAt": rfc3339(now)}
    return result


def _decisions(report: Report, previous: Mapping[str, Any], now: float) -> list[dict[str, Any]]:
    decisions = list(previous.get("decisions") or [])
    before, after = previous.get("desiredReplicas"), report.counts["desiredReplicas"]
    if before is not None and before != after:
        decision = {
            "time": rfc3339(now),
            "from": before,
            "to": after,
            "reason": report.decision_reason,
            "inputs": dict(report.decision_inputs),
        }
        decisions.append(decision)
    return decisions[-DECISIONS_KEPT:]


def invalid(
    generation: int, conditions: Sequence[Condition], previous: Mapping[str, Any], now: float
) -> dict[str, Any]:
    """Status of an object that cannot be acted on: the counts as they were, other conditions."""
    return {
        **previous,
        "observedGeneration": generation,
        "conditions": written(conditions, generation, previous, now),
    }


def last_shrink(status: Mapping[str, Any]) -> float | None:
    """Time of the newest decision that made the fleet smaller, seconds since the epoch."""
    times = [
        timestamp(decision["time"])
        for decision in status.get("decisions") or []
        if decision["to"] < decision["from"]
    ]
    return max(times, default=None)
