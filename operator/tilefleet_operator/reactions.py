"""What node autoscalers say about pods that find no node, read from their Events.

Karpenter nominates a pod for a NodeClaim or says why it cannot; Cluster Autoscaler triggers a
scale-up or says why not. The newest word counts. Does not know what the pods are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tilefleet_operator.errors import ObservationInvalid
from tilefleet_operator.units import timestamp

_COMING = ("Nominated", "TriggeredScaleUp")
_NOT_COMING = ("NotTriggerScaleUp", "FailedScheduling")
REASONS = (*_COMING, *_NOT_COMING)
# It shares its reason with Karpenter, and is no autoscaler.
_SCHEDULER = "default-scheduler"
_TEXT_CHARACTERS = 300


@dataclass(frozen=True)
class Reaction:
    """One autoscaler's word on one pod.

    coming: a node will come. who: the autoscaler. time: seconds since the epoch.
    """

    coming: bool
    who: str
    message: str
    time: float

    def __str__(self) -> str:
        """As a message names it."""
        return f"{self.who}: {self.message}"


def reactions(events: Iterable[Mapping[str, Any]]) -> dict[str, Reaction]:
    """The newest reaction by UID of the pod; events of other kinds and reasons are passed over."""
    found: dict[str, Reaction] = {}
    for event in events:
        uid = str((event.get("involvedObject") or {}).get("uid") or "")
        reason, who = event.get("reason"), _component(event)
        if not uid or reason not in REASONS or (reason == "FailedScheduling" and not _speaks(who)):
            continue
        message = str(event.get("message") or "")[:_TEXT_CHARACTERS]
        one = Reaction(reason in _COMING, who, message, _time(event))
        if uid not in found or found[uid].time <= one.time:
            found[uid] = one
    return found


def _speaks(who: str) -> bool:
    return bool(who) and not who.endswith(_SCHEDULER)


def _component(event: Mapping[str, Any]) -> str:
    source = (event.get("source") or {}).get("component")
    return str(source or event.get("reportingComponent") or "")


def _time(event: Mapping[str, Any]) -> float:
    series = (event.get("series") or {}).get("lastObservedTime")
    created = (event.get("metadata") or {}).get("creationTimestamp")
    text = series or event.get("lastTimestamp") or event.get("eventTime") or created
    if not text:
        raise ObservationInvalid("an Event without any time")
    return timestamp(str(text))
