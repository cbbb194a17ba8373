"""Status and conditions: always complete, and still when nothing happens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.operator.builders import (
    DEFAULTS,
    NOW,
    amd,
    children,
    deployment,
    manual,
    node,
    pod,
    snapshot,
    stats,
)
from tilefleet_operator.condition import Condition
from tilefleet_operator.conditions import TYPES
from tilefleet_operator.crd import crd
from tilefleet_operator.desired import revision
from tilefleet_operator.observed import MissingStats, Snapshot
from tilefleet_operator.plan import plan
from tilefleet_operator.status import (
    DECISIONS_KEPT,
    Report,
    Telemetry,
    build,
    last_shrink,
    wait,
)
from tilefleet_operator.units import rfc3339

COUNTS = {"desiredReplicas": 1}
READY = [Condition("Ready", "True", "AllReplicasReady", "1 of 1 replicas are ready")]


def report(**changes: Any) -> Report:
    base = Report(generation=1, counts=COUNTS, selector="a=b", revision="r", conditions=READY)
    return replace(base, **changes)


def measured(demand: float, capacity: float = 100.0) -> Telemetry:
    return Telemetry(demand / capacity, capacity, "Observed", demand, 0.0)


def conditions(found: Snapshot, now: float = NOW) -> dict[str, Mapping[str, Any]]:
    status = plan(found, DEFAULTS, now).status
    assert status is not None
    return {c["type"]: c for c in status["conditions"]}


def test_status_is_equal_when_nothing_changed() -> None:
    first = build(report(telemetry=measured(50)), {}, NOW)
    assert build(report(telemetry=measured(50)), first, NOW + 999) == first


def test_telemetry_alone_is_written_every_30_seconds_at_most_and_above_5_percent() -> None:
    first = build(report(telemetry=measured(50)), {}, NOW)
    assert first["demand"] == {"tokensPerSecond": 50, "queueTokens": 0}
    assert build(report(telemetry=measured(90)), first, NOW + 29) == first
    assert wait(report(telemetry=measured(90)), first, NOW + 29) == 1.0
    later = build(report(telemetry=measured(90)), first, NOW + 30)
    assert later["demand"]["tokensPerSecond"] == 90
    assert later["capacity"]["sampledAt"] == rfc3339(NOW + 30)
    near = report(telemetry=measured(52))
    assert build(near, first, NOW + 300) == first
    assert wait(near, first, NOW + 300) is None


def test_telemetry_rides_along_with_any_other_change() -> None:
    first = build(report(telemetry=measured(50)), {}, NOW)
    other = report(telemetry=measured(90), counts={"desiredReplicas": 2})
    assert build(other, first, NOW + 2)["demand"]["tokensPerSecond"] == 90


def test_vanished_telemetry_is_a_change() -> None:
    first = build(report(telemetry=measured(50)), {}, NOW)
    assert "utilization" not in build(report(), first, NOW + 30)


def test_idle_noise_is_no_change() -> None:
    first = build(report(telemetry=measured(0.0)), {}, NOW)
    assert build(report(telemetry=measured(0.4)), first, NOW + 60) == first


def test_transition_time_moves_only_with_the_status_value() -> None:
    first = build(report(), {}, NOW)
    words = [replace(READY[0], message="2 of 2 replicas are ready")]
    same = build(report(conditions=words, generation=2), first, NOW + 60)
    assert same["conditions"][0]["lastTransitionTime"] == rfc3339(NOW)
    assert same["conditions"][0]["observedGeneration"] == 2
    flipped = build(report(conditions=[replace(READY[0], status="False")]), same, NOW + 90)
    assert flipped["conditions"][0]["lastTransitionTime"] == rfc3339(NOW + 90)


def test_last_ten_decisions_are_kept_with_their_inputs() -> None:
    status = build(report(), {}, NOW)
    assert status["decisions"] == []
    for i in range(14):
        counts = {"desiredReplicas": i % 3}
        status = build(
            report(counts=counts, decision_reason="why", decision_inputs={"ready": str(i)}),
            status,
            NOW + i,
        )
    assert len(status["decisions"]) == DECISIONS_KEPT
    newest = status["decisions"][-1]
    assert newest == {
        "time": rfc3339(NOW + 13),
        "from": 0,
        "to": 1,
        "reason": "why",
        "inputs": {"ready": "13"},
    }
    assert last_shrink(status) == NOW + 12


def test_every_condition_is_always_present() -> None:
    found = conditions(snapshot(manual(1)))
    assert tuple(found) == TYPES
    assert all(c["observedGeneration"] == 1 for c in found.values())
    assert all(c["reason"] and c["message"] for c in found.values())


@pytest.mark.parametrize(
    ("wanted", "ready", "expected"),
    [
        (0, 0, ("True", "ScaledToZero")),
        (2, 2, ("True", "AllReplicasReady")),
        (2, 1, ("False", "Starting")),
        (2, 0, ("False", "Starting")),
    ],
)
def test_ready_of_a_fixed_size(wanted: int, ready: int, expected: tuple[str, str]) -> None:
    of = manual(wanted)
    new = revision(of, DEFAULTS)
    pods = tuple(pod(f"llm-{new}-{i}", new, ready=i < ready) for i in range(wanted))
    found = conditions(snapshot(of, pods))["Ready"]
    assert (found["status"], found["reason"]) == expected


def test_auto_fleet_is_ready_with_its_minimum() -> None:
    of = deployment({"desiredReplicas": 3}, autoscaling={"minReplicas": 1, "maxReplicas": 3})
    new = revision(of, DEFAULTS)
    pods = tuple(pod(f"llm-{new}-{i}", new, ready=i == 0) for i in range(3))
    found = conditions(snapshot(of, pods, {pods[0].uid: stats()}))["Ready"]
    assert (found["reason"], found["message"]) == (
        "MinimumAvailable",
        "1 of 3 replicas are ready",
    )


def test_third_replica_that_does_not_fit_says_why_on_the_object() -> None:
    of = amd(3)
    new = revision(of, DEFAULTS)
    devices = {"amd.com/gpu": 8.0}
    placed = [pod(f"llm-{new}-{i}", new, node=f"n{i}", requests=devices) for i in range(2)]
    pending = pod(
        f"llm-{new}-2", new, node=None, ready=False, phase="Pending", reason="Unschedulable",
        message="0/2 nodes are available", requests=devices,
    )  # fmt: skip
    nodes = tuple(replace(node("spx8"), name=f"n{i}") for i in range(2))
    use = {"n0": devices, "n1": devices}
    found = snapshot(of, (*placed, pending), nodes=nodes, device_use=use)
    limited = conditions(found)["CapacityLimited"]
    assert (limited["status"], limited["reason"]) == ("True", "InsufficientGPU")
    assert limited["message"] == (
        "3 replicas × 8 amd.com/gpu = 24 wanted; matching nodes n0 (8 free of 8), n1 (8 free of 8)"
        " = 16; short of 8; no node autoscaler reacts"
    )
    events = plan(found, DEFAULTS, NOW).events
    assert ("Warning", "CapacityLimited", limited["message"]) in events
    two = amd(2)
    new = revision(two, DEFAULTS)
    fits = tuple(replace(p, revision=new) for p in placed)
    assert (
        conditions(snapshot(two, fits, nodes=nodes, device_use=use))["CapacityLimited"]["status"]
        == "False"
    )


def test_running_fleet_is_not_limited_by_a_node_that_takes_no_new_pods() -> None:
    of = amd(1)
    new = revision(of, DEFAULTS)
    here = pod(f"llm-{new}-0", new, node="spx8", requests={"amd.com/gpu": 8.0})
    cordoned = replace(node("spx8"), schedulable=False)
    found = conditions(snapshot(of, (here,), nodes=(cordoned,)))
    assert found["CapacityLimited"]["status"] == "False"
    pending = replace(here, ready=False, node=None)
    found = conditions(snapshot(of, (pending,), nodes=(cordoned,)))
    assert "refused: spx8 (cordoned)" in found["CapacityLimited"]["message"]


def test_no_matching_node_names_the_refused_ones() -> None:
    found = conditions(snapshot(amd(1), nodes=(node("sick"),)))["AcceleratorMatched"]
    assert (found["status"], found["reason"]) == ("False", "NoMatchingNodes")
    assert "sick (taint amd-gpu-unhealthy=AMDGPUXgmi)" in found["message"]
    none = conditions(snapshot(amd(1)))["AcceleratorMatched"]
    assert none["message"] == "no node matches MI300X; the cluster has no AMD node"


def test_pod_without_room_on_cpu_repeats_the_scheduler_s_words() -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    stuck = pod(
        f"llm-{new}-0", new, node=None, ready=False, reason="Unschedulable",
        message="0/1 nodes are available: 1 Insufficient cpu.",
    )  # fmt: skip
    limited = conditions(snapshot(of, (stuck,)))["CapacityLimited"]
    assert limited["reason"] == "InsufficientResources"
    assert "Insufficient cpu" in limited["message"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reason": "CrashLoopBackOff", "ready": False, "restarts": 4}, "CrashLoop"),
        ({"restarts": 3, "ready": False}, "CrashLoop"),
        ({"restarts": 3, "ready": True}, "None"),
        ({"reason": "ErrImagePull", "ready": False}, "ImagePull"),
        ({"reason": "ImagePullBackOff", "ready": False}, "ImagePull"),
        ({"reason": "CreateContainerConfigError", "ready": False}, "ContainerConfig"),
        ({"reason": "ContainerCreating", "ready": False}, "None"),
    ],
)
def test_degraded_and_failed(change: dict[str, Any], reason: str) -> None:
    of = manual(1)
    new = revision(of, DEFAULTS)
    found = conditions(snapshot(of, (pod(f"llm-{new}-0", new, **change),)))
    assert found["Degraded"]["reason"] == reason
    if reason != "None":
        assert found["Ready"]["reason"] == "Failed"
        assert f"llm-{new}-0" in found["Ready"]["message"]


def test_replica_on_a_sick_node_degrades_the_fleet() -> None:
    of = amd(1)
    new = revision(of, DEFAULTS)
    here = pod(f"llm-{new}-0", new, node="sick")
    found = conditions(snapshot(of, (here,), nodes=(node("sick"),)))["Degraded"]
    assert found["reason"] == "UnhealthyGPU"


def test_silent_replica_is_reported_once_it_had_time_to_answer() -> None:
    of = deployment()
    new = revision(of, DEFAULTS)
    here = pod(f"llm-{new}-0", new, ready_since=NOW)
    silent = snapshot(of, (here,), {here.uid: MissingStats("no /stats answer: timeout")})
    assert conditions(silent, NOW + 3)["MetricsAvailable"]["status"] == "True"
    late = conditions(silent, NOW + 10)["MetricsAvailable"]
    assert (late["status"], late["reason"]) == ("False", "Unreachable")
    assert "timeout" in late["message"]
    fixed = conditions(replace(silent, deployment=manual(1)), NOW + 10)["MetricsAvailable"]
    assert (fixed["status"], fixed["reason"]) == ("Unknown", "NotNeeded")
    nobody = conditions(snapshot(of))["MetricsAvailable"]
    assert (nobody["status"], nobody["reason"]) == ("Unknown", "NoReplicaReady")


def test_rollout_is_progress_until_the_last_old_pod_leaves() -> None:
    of = replace(manual(1), status={"currentRevision": "old"})
    new = revision(of, DEFAULTS)
    both = (pod("llm-old-0", "old"), pod(f"llm-{new}-0", new))
    rolling = plan(snapshot(of, both), DEFAULTS, NOW)
    assert rolling.status is not None
    by_type = {c["type"]: c for c in rolling.status["conditions"]}
    assert by_type["Progressing"]["reason"] == "RolloutInProgress"
    assert rolling.status["updateRevision"] == new
    done = replace(of, status=rolling.status)
    after = plan(snapshot(done, both[1:]), DEFAULTS, NOW)
    assert ("Normal", "RolloutComplete", "all replicas have one revision") in after.events


def test_counts_and_selector_serve_the_scale_subresource() -> None:
    of = manual(3)
    new = revision(of, DEFAULTS)
    pods = (
        pod(f"llm-{new}-0", new),
        pod(f"llm-{new}-1", new, ready=False),
        pod("llm-old-0", "old"),
        pod("llm-old-1", "old", state="draining", drain_started=NOW),
        pod("llm-old-2", "old", terminating=True, ready=False),
        pod("llm-old-3", "old", phase="Failed", ready=False),
    )
    status = plan(snapshot(of, pods), DEFAULTS, NOW).status
    assert status is not None
    assert {key: value for key, value in status.items() if isinstance(value, int)} == {
        "observedGeneration": 1,
        "replicas": 3,
        "readyReplicas": 2,
        "updatedReplicas": 2,
        "pendingReplicas": 1,
        "drainingReplicas": 1,
        "desiredReplicas": 3,
    }
    assert "tilefleet.io/state=active" in status["selector"]


def test_size_change_is_an_event_and_a_decision_with_its_reason() -> None:
    of = manual(3)
    first = plan(snapshot(of), DEFAULTS, NOW).status
    assert first is not None
    less = replace(manual(1), status=first)
    after = plan(snapshot(less), DEFAULTS, NOW + 1)
    assert after.status is not None
    assert after.status["decisions"][-1]["reason"] == "spec.replicas is 1"
    assert ("Normal", "ScaledDown", "from 3 to 1 replicas: spec.replicas is 1") in after.events


def test_status_fits_the_schema_of_the_crd() -> None:
    """Every field that plan() writes is one that the API server would keep."""
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]

    def pruned(node: Mapping[str, Any], value: Any) -> Any:
        if "properties" in node:
            known = node["properties"]
            return {k: pruned(known[k], v) for k, v in value.items() if k in known}
        if "items" in node:
            return [pruned(node["items"], item) for item in value]
        return value

    of = amd(1)
    new = revision(of, DEFAULTS)
    here = pod(f"llm-{new}-0", new)
    child = children(of)
    status = plan(snapshot(of, (here,), {here.uid: stats()}, children=child), DEFAULTS, NOW).status
    assert status is not None
    full = build(report(telemetry=measured(50)), status, NOW + 60)
    for written in (status, full):
        assert pruned(schema, written) == written
