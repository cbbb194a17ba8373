"""Builders of views: every field from where Kubernetes and the worker put it."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator.builders import NOW, stats, steps_of
from tilefleet_operator.errors import ObservationInvalid
from tilefleet_operator.observed import (
    History,
    MissingStats,
    device_use,
    node_view,
    pod_view,
    worker_stats,
)
from tilefleet_operator.polls import HISTORY_SECONDS, STEPS_KEPT, STEPS_PER_SAMPLE
from tilefleet_operator.units import quantity, rfc3339, seconds, timestamp

POD: dict[str, Any] = {
    "metadata": {
        "name": "llm-0a1b2c3d-2",
        "uid": "u1",
        "namespace": "team",
        "creationTimestamp": "2027-01-15T08:00:00Z",
        "labels": {"tilefleet.io/revision": "0a1b2c3d", "tilefleet.io/state": "draining"},
        "annotations": {"tilefleet.io/drain-started": "2027-01-15T08:01:00Z"},
        "ownerReferences": [{"uid": "x"}, {"uid": "cr", "controller": True}],
    },
    "spec": {
        "nodeName": "n1",
        "containers": [
            {"resources": {"requests": {"cpu": "500m"}, "limits": {"amd.com/gpu": "4"}}},
            {"resources": {"requests": {"cpu": "1"}}},
        ],
    },
    "status": {
        "phase": "Running",
        "podIP": "192.0.2.7",
        "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2027-01-15T08:00:30Z"}
        ],
        "containerStatuses": [{"restartCount": 2, "state": {"running": {}}}],
    },
}
STATS: dict[str, Any] = {
    "version": 1,
    "model": "tiny",
    "revision": "r",
    "uptime_seconds": 12.5,
    "draining": False,
    "ready": True,
    "block_size": 16,
    "counters": {"arrivals": 3, "steps": 7, "busy_seconds": 0.5, "from_the_future": 1},
    "gauges": {"running": 1, "waiting": 2, "kv_blocks_total": 100, "max_concurrent": 8},
    "steps": [{"seconds": 0.01, "prefill_tokens": 5, "sequences": 1, "kv_tokens": 9}],
    "startup": [{"phase": "weights", "seconds": 1.5}],
    "device": {"kind": "cpu"},
}


def test_pod_view() -> None:
    view = pod_view(POD)
    assert (view.name, view.uid, view.namespace, view.slot) == ("llm-0a1b2c3d-2", "u1", "team", 2)
    assert (view.phase, view.ready, view.terminating, view.restarts) == ("Running", True, False, 2)
    assert (view.ip, view.node, view.revision, view.state) == (
        "192.0.2.7",
        "n1",
        "0a1b2c3d",
        "draining",
    )
    assert view.requests == {"cpu": 1.5, "amd.com/gpu": 4.0}
    assert view.owner_uid == "cr"
    assert view.drain_started == view.created + 60
    assert view.ready_since == view.created + 30
    assert view.deletion_requested is None


def test_dying_pod_is_not_ready() -> None:
    dying = {**POD, "metadata": {**POD["metadata"], "deletionTimestamp": "2027-01-15T08:05:00Z"}}
    view = pod_view(dying)
    assert (view.ready, view.terminating) == (False, True)
    assert view.deletion_requested == view.created + 300


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {"containerStatuses": [
                {"state": {"waiting": {"reason": "ErrImagePull", "message": "m"}}}
            ]},
            ("ErrImagePull", "m"),
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False",
                             "reason": "Unschedulable", "message": "0/1"}]},
            ("Unschedulable", "0/1"),
        ),
        ({"reason": "Evicted", "message": "disk"}, ("Evicted", "disk")),
        ({}, ("", "")),
    ],
)  # fmt: skip
def test_reason_of_a_pod(status: dict[str, Any], expected: tuple[str, str]) -> None:
    view = pod_view({**POD, "status": status})
    assert (view.reason, view.message) == expected
    assert (view.phase, view.ready, view.ip) == ("Pending", False, None)


def test_pod_without_identity_is_refused() -> None:
    with pytest.raises(ObservationInvalid, match="uid"):
        pod_view({"metadata": {"name": "x"}})


def test_node_view() -> None:
    view = node_view(
        {
            "metadata": {"name": "n1", "labels": {"a": "b"}},
            "spec": {"unschedulable": True, "taints": [{"key": "k", "effect": "NoSchedule"}]},
            "status": {
                "allocatable": {"amd.com/gpu": "8", "memory": "1Gi"},
                "conditions": [{"type": "Ready", "status": "Unknown"}],
            },
        }
    )
    assert (view.ready, view.schedulable) == (False, False)
    assert view.allocatable == {"amd.com/gpu": 8.0, "memory": 2.0**30}
    assert view.capacity == view.allocatable
    assert view.taints[0].key == "k"
    with pytest.raises(ObservationInvalid):
        node_view({})


def test_device_use_counts_pods_that_have_not_ended() -> None:
    running = pod_view(POD)
    ended = pod_view({**POD, "status": {"phase": "Failed"}})
    unplaced = pod_view({**POD, "spec": {**POD["spec"], "nodeName": ""}})
    assert device_use((running, running, ended, unplaced)) == {"n1": {"amd.com/gpu": 8.0}}


def test_worker_stats() -> None:
    answer = worker_stats(json.loads(json.dumps(STATS)), age_seconds=1.5)
    assert (answer.counters.arrivals, answer.counters.busy_seconds) == (3, 0.5)
    assert (answer.inflight, answer.age_seconds, answer.block_size) == (3, 1.5, 16)
    assert answer.steps[0].kv_tokens == 9
    assert answer.startup == (("weights", 1.5),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"counters": {"arrivals": -1}}, "arrivals: -1"),
        ({"gauges": {"running": "many"}}, "running: 'many'"),
        ({"gauges": {"running": True}}, "running: True"),
        ({"counters": {"steps": float("nan")}}, "steps: nan"),
        ({"steps": [{"seconds": 1}]}, "prefill_tokens"),
        ({"steps": [{**STATS["steps"][0], "seconds": float("inf")}]}, "seconds: inf"),
        ({"draining": None, "counters": None}, "TypeError"),
    ],
)
def test_bad_stats_name_the_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ObservationInvalid, match=words):
        worker_stats({**STATS, **change})


def test_missing_field_of_stats_is_named() -> None:
    with pytest.raises(ObservationInvalid, match="uptime_seconds"):
        worker_stats({k: v for k, v in STATS.items() if k != "uptime_seconds"})


def test_history_is_bounded_and_never_mutated() -> None:
    first = History().add(NOW, {"a": stats(), "b": MissingStats("timeout")})
    assert list(first.latest) == ["a"]
    grown = first
    for i in range(1, 500):
        counters = {"arrivals": i}
        grown = grown.add(NOW + 2 * i, {"a": stats(**counters, steps=steps_of(1, 0, 0, 0))})
    assert len(first.frames) == 1
    assert grown.frames[-1].time - grown.frames[0].time <= HISTORY_SECONDS
    assert len(grown.steps) <= STEPS_KEPT


def test_steps_are_taken_once_and_thinned() -> None:
    reservoir = steps_of(0.01, 1e-5, 1e-5, 1e-8)

    def answer(steps: int) -> Any:
        base = stats(steps=reservoir)
        return replace(base, counters=replace(base.counters, steps=steps))

    history = History().add(NOW, {"a": answer(64)})
    assert len(history.steps) == STEPS_PER_SAMPLE
    assert history.add(NOW + 2, {"a": answer(64)}).steps == history.steps
    three = history.add(NOW + 2, {"a": answer(67)})
    assert three.steps[-3:] == reservoir[-3:]
    restarted = history.add(NOW + 2, {"a": answer(2)})
    assert restarted.steps[-2:] == reservoir[-2:]


@pytest.mark.parametrize(
    ("text", "value"),
    [("300s", 300.0), ("1m30s", 90.0), ("250ms", 0.25), ("2h", 7200.0)],
)
def test_seconds(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "s", "1.5s", "1d", "-1s", "1s x"])
def test_bad_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        seconds(text)


@pytest.mark.parametrize(
    ("text", "value"), [("8", 8.0), ("500m", 0.5), ("16Gi", 16 * 2.0**30), ("1.5k", 1500.0)]
)
def test_quantity(text: str, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "ten", "1Qi", "-1", "1 Gi"])
def test_bad_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        quantity(text)


@settings(deadline=None)
@given(st.integers(0, 4_000_000_000))
def test_times_round_trip(moment: int) -> None:
    assert timestamp(rfc3339(moment)) == moment
    assert timestamp(rfc3339(moment).replace("Z", ".250000Z")) == moment + 0.25
