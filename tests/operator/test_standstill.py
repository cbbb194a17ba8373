"""A rollout that has stopped: the former revision keeps its size, with its own pods."""

from collections.abc import Sequence
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
    pod,
    record,
    snapshot,
)
from tests.operator.test_hardware import node
from tests.operator.test_rollout import bounds, condition
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.desired import Defaults, revision
from tilefleet_operator.observed import PodView, Snapshot
from tilefleet_operator.plan import Apply, Delete, Drain, Plan, plan
from tilefleet_operator.units import rfc3339

MARKS = {Apply: "+", Drain: "~", Delete: "-"}


def before_and_after(
    make: Any, wanted: int, surge: int, unavailable: int
) -> tuple[InferenceDeployment, InferenceDeployment]:
    more = bounds(surge, unavailable, progressDeadline="30s")
    was = make(wanted, engine={"maxBatchTokens": 64}, **more)
    return was, make(wanted, engine={"maxBatchTokens": 65}, **more)


def stopped(
    was: InferenceDeployment, of: InferenceDeployment, pods: Sequence[PodView], **changes: Any
) -> Snapshot:
    """Long after the deadline; `was` is the revision that was everywhere."""
    old, new = revision(was, DEFAULTS), revision(of, DEFAULTS)
    mark = {"revision": new, "readyReplicas": 0, "progressedAt": rfc3339(NOW - 300)}
    first = record(was, 1)
    found = children(of) | {("ControllerRevision", f"llm-{old}"): first}
    found["ControllerRevision", f"llm-{new}"]["revision"] = 2
    status = {"currentRevision": old, "rollout": mark}
    return snapshot(replace(of, status=status), tuple(pods), children=found, **changes)


def acts(step: Plan, old: str, new: str) -> str:
    """Actions on pods as one line, revisions by their role."""
    names = [
        f"{MARKS[type(a)]}{a.name.removeprefix('llm-')}" for a in step.actions if a.kind == "Pod"
    ]
    return " ".join(names).replace(old, "old").replace(new, "new")


@pytest.mark.parametrize(
    ("surge", "unavailable", "old_left", "broken", "expected"),
    [
        # nothing is lost: nothing happens, the broken pod stays and shows why
        (1, 0, 3, 1, ""),
        (0, 1, 2, 1, ""),
        (2, 2, 3, 2, ""),
        # a serving replica is lost: it comes back as the former revision
        (1, 0, 2, 1, "+old-2"),
        (0, 1, 1, 1, "+old-1"),
        (1, 1, 1, 1, "+old-1"),
        # where broken pods hold the room, all but one of them make place
        (2, 0, 1, 3, "-new-2 +old-1 +old-2"),
        (0, 2, 0, 2, "+old-0"),
        (0, 1, 1, 2, "-new-1 +old-1"),
        # the pod that tried is gone: another one tries
        (1, 0, 3, 0, "+new-0"),
    ],
)
def test_what_served_is_restored_within_the_bounds(
    surge: int, unavailable: int, old_left: int, broken: int, expected: str
) -> None:
    was, of = before_and_after(manual, 3, surge, unavailable)
    old, new = revision(was, DEFAULTS), revision(of, DEFAULTS)
    pods = [pod(f"llm-{old}-{i}", old, created=NOW - 900) for i in range(old_left)]
    pods += [pod(f"llm-{new}-{i}", new, ready=False, created=NOW - 200 + i) for i in range(broken)]
    step = plan(stopped(was, of, pods), DEFAULTS, NOW)
    assert acts(step, old, new) == expected
    assert step.status is not None
    said = condition(step.status, "Progressing")
    assert said["reason"] == "ProgressDeadlineExceeded"
    assert "the former revision goes on serving" in said["message"]


def test_restored_pod_is_a_pod_of_the_former_spec_and_image() -> None:
    was, of = before_and_after(manual, 2, 1, 0)
    old = revision(was, DEFAULTS)
    found = stopped(was, of, [pod(f"llm-{old}-0", old)])
    newer = Defaults(worker_image="rocm:2", worker_cpu_image="cpu:2")
    restored = next(
        a
        for a in plan(found, newer, NOW).actions
        if isinstance(a, Apply) and a.name == f"llm-{old}-1"
    )
    container = restored.body["spec"]["containers"][0]
    assert container["image"] == "cpu:1"
    assert container["args"][container["args"].index("--max-batch-tokens") + 1] == "64"
    assert restored.body["metadata"]["labels"]["tilefleet.io/revision"] == old
    assert "1 of 2 replicas serve; the former revision fills up" in restored.why


def test_restored_pods_that_start_are_left_alone_and_failed_ones_back_off() -> None:
    was, of = before_and_after(manual, 2, 1, 0)
    old, new = revision(was, DEFAULTS), revision(of, DEFAULTS)
    serving, tried = pod(f"llm-{old}-0", old), pod(f"llm-{new}-0", new, ready=False)
    starting = pod(f"llm-{old}-1", old, ready=False, created=NOW)
    assert acts(plan(stopped(was, of, (serving, starting, tried)), DEFAULTS, NOW), old, new) == ""
    failed = replace(starting, phase="Failed", reason="Evicted", node="n1")
    found = stopped(was, of, (serving, failed, tried))
    assert acts(plan(found, DEFAULTS, NOW + 9), old, new) == ""
    later = plan(found, DEFAULTS, NOW + 10)
    assert acts(later, old, new) == "-old-1 +old-2"
    made = next(a for a in later.actions if isinstance(a, Apply) and a.kind == "Pod")
    assert made.body["metadata"]["annotations"]["tilefleet.io/avoid-nodes"] == "n1"


def test_smaller_fleet_while_stopped() -> None:
    was, of = before_and_after(manual, 1, 1, 0)
    old, new = revision(was, DEFAULTS), revision(of, DEFAULTS)
    pods = [pod(f"llm-{old}-{i}", old) for i in range(3)]
    pods.append(pod(f"llm-{new}-0", new, ready=False))
    assert acts(plan(stopped(was, of, pods), DEFAULTS, NOW), old, new) == "~old-0 ~old-1"
    was, of = before_and_after(manual, 0, 1, 0)
    step = plan(stopped(was, of, pods), DEFAULTS, NOW)
    assert acts(step, old, new) == "~old-0 ~old-1 ~old-2 -new-0"


def test_pods_of_a_third_revision_that_do_not_serve_leave() -> None:
    was, of = before_and_after(manual, 1, 1, 0)
    old, new = revision(was, DEFAULTS), revision(of, DEFAULTS)
    pods = [pod(f"llm-{old}-0", old), pod("llm-third-0", "third", ready=False)]
    pods.append(pod(f"llm-{new}-0", new, ready=False))
    assert acts(plan(stopped(was, of, pods), DEFAULTS, NOW), old, new) == "-third-0"


def test_without_a_record_of_the_former_revision_what_serves_stays() -> None:
    was, of = before_and_after(manual, 2, 1, 0)
    old, new = revision(was, DEFAULTS), revision(of, DEFAULTS)
    found = stopped(was, of, [pod(f"llm-{old}-0", old), pod(f"llm-{new}-0", new, ready=False)])
    lost = {k: v for k, v in found.children.items() if k[1] != f"llm-{old}"}
    step = plan(replace(found, children=lost), DEFAULTS, NOW)
    assert acts(step, old, new) == "+new-1"


def test_restored_gpu_pods_ask_for_what_the_former_spec_asked_for() -> None:
    was, of = before_and_after(amd, 2, 1, 0)
    was = replace(was, spec=amd(2, count=4, engine={"maxBatchTokens": 64}).spec)
    old = revision(was, DEFAULTS)
    nodes = (replace(node("spx8"), name="n0"),)
    found = stopped(was, of, [pod(f"llm-{old}-0", old, node="n0")], nodes=nodes)
    restored = next(
        a
        for a in plan(found, DEFAULTS, NOW).actions
        if isinstance(a, Apply) and a.name == f"llm-{old}-1"
    )
    limits = restored.body["spec"]["containers"][0]["resources"]["limits"]
    assert limits["amd.com/gpu"] == "4"


def test_auto_fleets_are_restored_too() -> None:
    scaling = {"mode": "Auto", "minReplicas": 2, "maxReplicas": 3}
    more = bounds(1, 0, progressDeadline="30s")
    was = deployment(autoscaling=scaling, engine={"maxBatchTokens": 64}, **more)
    of = deployment(autoscaling=scaling, engine={"maxBatchTokens": 65}, **more)
    old, new = revision(was, DEFAULTS), revision(of, DEFAULTS)
    pods = [pod(f"llm-{old}-0", old), pod(f"llm-{new}-0", new, ready=False)]
    assert acts(plan(stopped(was, of, pods), DEFAULTS, NOW), old, new) == "+old-1"
