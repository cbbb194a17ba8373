"""One condition, and how a list of them is written into a status without flapping.

Does not know what any condition is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tilefleet_operator.reasons import ConditionType, Reason
from tilefleet_operator.units import rfc3339, timestamp

HOLD_SECONDS = 10.0
Written = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """One observed fact: status is "True", "False" or "Unknown"."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: Reason
    message: str


def written(
    conditions: Sequence[Condition], generation: int, previous: Written, now: float
) -> list[dict[str, Any]]:
    """Conditions for the status; lastTransitionTime moves only when the status value does.

    previous: the whole status before. A value that is held stays with its reason and message.
    """
    known = _known(previous)
    result = []
    for condition in conditions:
        before = known.get(condition.type, {})
        if _held_for(condition, generation, previous, now) > 0:
            result.append({**before, "observedGeneration": generation})
            continue
        same = before.get("status") == condition.status
        result.append(
            {
                "type": condition.type,
                "status": condition.status,
                "observedGeneration": generation,
                "lastTransitionTime": before["lastTransitionTime"] if same else rfc3339(now),
                "reason": condition.reason,
                "message": condition.message,
            }
        )
    return result


def hold_wait(
    conditions: Sequence[Condition], generation: int, previous: Written, now: float
) -> float | None:
    """Seconds until the next held condition may take its new value; None when none is held."""
    held = (_held_for(condition, generation, previous, now) for condition in conditions)
    return min((left for left in held if left > 0), default=None)


def _held_for(condition: Condition, generation: int, previous: Written, now: float) -> float:
    """Seconds for which the value that was written before must stay; at most 0 when it need not.

    A value stays for 10 s, so that one lost answer or one late pod is no storm of transitions. The
    first change of a condition may come at once, because it cannot flap yet, and so may the answer
    to a changed spec. A clock that was set back holds nothing.
    """
    before = _known(previous).get(condition.type)
    if before is None or before["status"] == condition.status:
        return 0.0
    if generation != previous.get("observedGeneration"):
        return 0.0
    times = [one["lastTransitionTime"] for one in previous["conditions"]]
    since = before["lastTransitionTime"]
    if since == min(times) or now < timestamp(since):
        return 0.0
    return timestamp(since) + HOLD_SECONDS - now


def _known(previous: Written) -> dict[str, Written]:
    return {condition["type"]: condition for condition in previous.get("conditions") or []}
