"""A fleet on MI300X Node objects: placement by AMD's labels, and why one does not fit."""

from fleets import amd_fleet
from testbed import Json, Testbed, condition, until


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
