"""Events of node autoscalers become the newest word on each pod."""

from typing import Any

import pytest

from tilefleet_operator.errors import ObservationInvalid
from tilefleet_operator.reactions import Reaction, reactions
from tilefleet_operator.units import timestamp

TIME = "2026-11-24T11:10:19Z"


def event(reason: str, who: str, time: str = TIME, **changes: Any) -> dict[str, Any]:
    """An Event as client-go's old recorder writes it."""
    return {
        "metadata": {"name": "e"},
        "involvedObject": {"kind": "Pod", "uid": "u"},
        "reason": reason,
        "message": f"{reason} by {who}",
        "source": {"component": who},
        "lastTimestamp": time,
        **changes,
    }


@pytest.mark.parametrize(
    ("reason", "who", "coming"),
    [
        ("Nominated", "karpenter", True),
        ("FailedScheduling", "karpenter", False),
        ("TriggeredScaleUp", "cluster-autoscaler", True),
        ("NotTriggerScaleUp", "cluster-autoscaler", False),
    ],
)
def test_words_of_karpenter_and_cluster_autoscaler(reason: str, who: str, coming: bool) -> None:
    found = reactions([event(reason, who)])
    assert found == {"u": Reaction(coming, who, f"{reason} by {who}", timestamp(TIME))}
    assert str(found["u"]) == f"{who}: {reason} by {who}"


def test_the_scheduler_is_no_autoscaler() -> None:
    """It writes the new kind of Event: no source, a reporting component, eventTime alone."""
    new = {
        "source": {},
        "reportingComponent": "default-scheduler",
        "lastTimestamp": None,
        "eventTime": "2026-11-24T11:10:18.345956Z",
    }
    assert reactions([event("FailedScheduling", "", **new)]) == {}
    assert reactions([event("FailedScheduling", "")]) == {}
    assert reactions([event("Scheduled", "karpenter"), event("Pulled", "kubelet")]) == {}


def test_the_newest_word_counts_whatever_the_order() -> None:
    old = event("Nominated", "karpenter", "2026-11-24T11:10:00Z")
    new = event("FailedScheduling", "karpenter", "2026-11-24T11:11:00Z")
    assert reactions([old, new]) == reactions([new, old])
    assert not reactions([old, new])["u"].coming
    series = {"series": {"count": 3, "lastObservedTime": "2026-11-24T11:12:00.5Z"}}
    assert reactions([new, {**old, **series}])["u"].coming


def test_long_words_are_cut_and_an_event_without_time_is_an_error() -> None:
    long = event("NotTriggerScaleUp", "cluster-autoscaler", message="x" * 5000)
    assert len(reactions([long])["u"].message) == 300
    with pytest.raises(ObservationInvalid, match="without any time"):
        reactions([event("Nominated", "karpenter", lastTimestamp=None)])
