"""A fleet on MI300X Node objects: placement by AMD's labels, and why one does not fit."""

from collections.abc import Iterator

import amd_node_objects
import pytest
from fleets import amd_fleet, fleet, merged
from testbed import Json, Testbed, condition, is_ready, until

KINDS = {"spx-a": "spx8", "spx-b": "spx8", "cpx": "cpx64", "twoids": "twoids", "sick": "sick"}


def test_third_replica_that_does_not_fit_says_why(
    testbed: Testbed, namespace: str, mi300x_nodes: list[str]
) -> None:
    """Two nodes of 8 GPUs take two replicas of 8; the object explains the third with numbers."""
    testbed.apply(amd_fleet("big", namespace, replicas=3, count=8))

    def look() -> tuple[list[Json] | None, str]:
        placed = [p for p in testbed.pods("big", namespace) if p["spec"].get("nodeName")]
        running = [p for p in placed if p["status"]["phase"] == "Running"]
        return (running if len(running) == 2 else None), f"{len(placed)} placed"

    placed = until("two replicas run", look, 60)
    assert {p["spec"]["nodeName"] for p in placed} == set(mi300x_nodes)
    for pod in placed:
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        assert limits["amd.com/gpu"] in (8, "8")

    def limited() -> tuple[Json | None, str]:
        found = testbed.get("infd", "big", namespace) or {}
        reported = condition(found, "CapacityLimited")
        # Until nobody has reacted for half a minute, a node may still be coming.
        return (reported if reported.get("reason") == "InsufficientGPU" else None), str(reported)

    reported = until("the object says that capacity is short", limited, 60)
    assert reported["status"] == "True"
    for part in ("amd.com/gpu", "8", "16"):
        assert part in reported["message"], reported["message"]


def test_no_matching_node_is_said_on_the_object(testbed: Testbed, namespace: str) -> None:
    testbed.apply(amd_fleet("nowhere", namespace, replicas=1, count=1))

    def look() -> tuple[Json | None, str]:
        found = testbed.get("infd", "nowhere", namespace) or {}
        reported = condition(found, "AcceleratorMatched")
        return (reported if reported.get("status") == "False" else None), str(reported)

    reported = until("the object says that no node matches", look, 30)
    assert reported["reason"] == "NoMatchingNodes"
    assert "MI300X" in reported["message"]


@pytest.fixture
def mixed_nodes(testbed: Testbed) -> Iterator[None]:
    """Whole GPUs, partitions under their own resource name, two models on one node, a sick one."""
    if not testbed.is_local:
        pytest.skip("fake nodes are added to the local cluster only")
    amd_node_objects.add(testbed, KINDS)
    yield
    testbed.remove_fake_nodes()


def placed(testbed: Testbed, namespace: str, name: str, count: int) -> tuple[list[Json], Json]:
    """The fleet's ready pods once there are `count`, and its accelerator status."""

    def look() -> tuple[list[Json] | None, str]:
        found = [pod for pod in testbed.pods(name, namespace) if is_ready(pod)]
        why = condition(testbed.get("infd", name, namespace) or {}, "CapacityLimited")
        return (found if len(found) == count else None), f"{len(found)} of {count}: {why}"

    pods = until(f"{name} is placed", look, 90)
    status = testbed.wait_ready(name, namespace)["status"]
    return pods, status["accelerator"]


def on(pods: list[Json]) -> set[str]:
    return {pod["spec"]["nodeName"] for pod in pods}


@pytest.mark.usefixtures("mixed_nodes")
def test_the_scheduler_places_partitions_fallbacks_and_packs(
    testbed: Testbed, namespace: str
) -> None:
    """The real scheduler takes only nodes that were judged to match, and fills one first."""

    def apply(name: str, replicas: int, count: int, accelerator: Json) -> None:
        spec = amd_fleet(name, namespace, replicas, count)["spec"]
        testbed.apply(fleet(name, namespace, merged(spec, {"accelerator": accelerator})))

    apply("parts", 3, 1, {"partition": {"compute": "CPX", "memory": "NPS4"}})
    pods, status = placed(testbed, namespace, "parts", 3)
    assert on(pods) == {"cpx"}
    assert (status["resourceName"], status["memoryPerDevice"]) == ("amd.com/cpx_nps4", "24G")

    apply("whole", 3, 2, {})
    pods, status = placed(testbed, namespace, "whole", 3)
    assert len(on(pods)) == 1, "one node is filled before the next"
    assert on(pods) < {"spx-a", "spx-b"}
    (filled,) = on(pods)

    apply("big", 1, 8, {"products": ["MI355X"], "fallbacks": [{"products": ["MI300X"]}]})
    pods, status = placed(testbed, namespace, "big", 1)
    assert on(pods) == {"spx-a", "spx-b"} - {filled}
    assert status["placed"] == {"MI300X × 8 amd.com/gpu": 1}

    matched = condition(testbed.get("infd", "whole", namespace) or {}, "AcceleratorMatched")
    assert "sick (taint amd-gpu-unhealthy=AMDGPUXgmi)" in matched["message"]
    assert "twoids (mixes device ids 740f, 74a1)" in matched["message"]
