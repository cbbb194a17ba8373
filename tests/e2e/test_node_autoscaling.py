"""Real Karpenter: nodes come for a fleet and go with it, and a shortage is said and heals."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import node_pool
import pytest
from fleets import amd_fleet
from testbed import Json, Testbed, condition, is_ready, until

FLEET = "elastic"


@pytest.fixture
def pool(testbed: Testbed, namespace: str, tmp_path: Path) -> Iterator[None]:
    """Karpenter with an empty pool of MI300X nodes."""
    if not testbed.is_local:
        pytest.skip("Karpenter with fake nodes runs in the local cluster only")
    with node_pool.running(testbed, tmp_path):
        yield
        testbed.kubectl("delete", "infd", "--all", "-n", namespace, "--wait=true", seconds=90)


def scale(testbed: Testbed, namespace: str, replicas: int) -> None:
    patch = json.dumps({"spec": {"replicas": replicas}})
    testbed.kubectl("-n", namespace, "patch", "infd", FLEET, "--type=merge", "-p", patch)


def limited(testbed: Testbed, namespace: str, status: str, reason: str, seconds: float) -> Json:
    """The condition CapacityLimited once it has this status and reason."""

    def look() -> tuple[Json | None, str]:
        found = condition(testbed.get("infd", FLEET, namespace) or {}, "CapacityLimited")
        fits = found.get("status") == status and found.get("reason") == reason
        return (found if fits else None), str(found)

    return until(f"CapacityLimited is {status}, {reason}", look, seconds)


def serving(testbed: Testbed, namespace: str, count: int, seconds: float) -> list[Json]:
    """The fleet's ready pods once there are `count` of them, and no others."""

    def look() -> tuple[list[Json] | None, str]:
        pods = testbed.pods(FLEET, namespace)
        ready = [pod for pod in pods if is_ready(pod)]
        return (ready if len(ready) == len(pods) == count else None), f"{len(ready)}/{len(pods)}"

    return until(f"{count} replicas serve", look, seconds)


def no_nodes(testbed: Testbed, seconds: float) -> None:
    until("the pool is empty", lambda: (not node_pool.nodes(testbed) or None, ""), seconds)


@pytest.mark.usefixtures("pool")
def test_nodes_come_for_a_fleet_and_go_with_it(testbed: Testbed, namespace: str) -> None:
    """0 → 2 → 0 on an empty pool; the object says that nodes are coming, then that all fits."""
    testbed.apply(amd_fleet(FLEET, namespace, replicas=0, count=8))
    testbed.wait_ready(FLEET, namespace)
    assert node_pool.nodes(testbed) == []
    scale(testbed, namespace, 2)
    waiting = limited(testbed, namespace, "True", "WaitingForNode", 60)
    assert "nodeclaim/" in limited_by_karpenter(testbed, namespace, waiting)
    pods = serving(testbed, namespace, 2, 120)
    assert {pod["spec"]["nodeName"] for pod in pods} == set(node_pool.nodes(testbed))
    limited(testbed, namespace, "False", "None", 30)
    found = testbed.wait_ready(FLEET, namespace)
    assert found["status"]["accelerator"]["matchingNodes"] == 2
    assert found["status"]["accelerator"]["placed"] == {"MI300X × 8 amd.com/gpu": 2}
    until("serving replicas may be moved", lambda: movable(testbed, namespace), 30)
    scale(testbed, namespace, 0)
    serving(testbed, namespace, 0, 60)
    no_nodes(testbed, 120)


def limited_by_karpenter(testbed: Testbed, namespace: str, seen: Json) -> str:
    """The message once it tells what Karpenter does; the operator reads that every few seconds."""

    def look() -> tuple[str | None, str]:
        message = condition(testbed.get("infd", FLEET, namespace) or {}, "CapacityLimited").get(
            "message", seen["message"]
        )
        return (message if "nodeclaim/" in message else None), message

    return until("the message names the coming node", look, 30)


def movable(testbed: Testbed, namespace: str) -> tuple[bool | None, str]:
    """Whether every replica's annotations let Karpenter and Cluster Autoscaler move it."""
    found = [pod["metadata"]["annotations"] for pod in testbed.pods(FLEET, namespace)]
    marks = [one["karpenter.sh/do-not-disrupt"] for one in found]
    marks += [one["cluster-autoscaler.kubernetes.io/safe-to-evict"] for one in found]
    return (True if marks == ["false", "false", "true", "true"] else None), str(marks)


@pytest.mark.usefixtures("pool")
def test_missing_offer_is_said_within_a_minute_and_heals(testbed: Testbed, namespace: str) -> None:
    node_pool.use_zone(testbed, node_pool.OTHER_ZONE)
    testbed.apply(amd_fleet(FLEET, namespace, replicas=1, count=8))
    reported = limited(testbed, namespace, "True", "InsufficientGPU", 60)
    for part in ("1 replicas × 8 amd.com/gpu = 8 wanted", "no node matches", "karpenter"):
        assert part in reported["message"], reported["message"]
    assert node_pool.nodes(testbed) == []
    node_pool.use_zone(testbed, node_pool.ZONE)
    serving(testbed, namespace, 1, 180)
    limited(testbed, namespace, "False", "None", 30)
    scale(testbed, namespace, 0)
    no_nodes(testbed, 120)


@pytest.mark.usefixtures("pool")
def test_a_replica_takes_a_balloon_s_warm_place(testbed: Testbed, namespace: str) -> None:
    """The replica runs on the balloon's node, and the balloon moves on to a new one."""
    fleet = amd_fleet(FLEET, namespace, replicas=0, count=8)
    fleet["spec"]["capacity"] = {"balloon": {"replicas": 1}}
    testbed.apply(fleet)

    def ballooned() -> tuple[str | None, str]:
        found = testbed.find("pods", namespace, "tilefleet.io/role=balloon")
        warm = [pod["spec"]["nodeName"] for pod in found if is_ready(pod)]
        return (warm[0] if len(warm) == 1 else None), str([p["metadata"]["name"] for p in found])

    warm = until("a balloon holds a place", ballooned, 120)
    assert (testbed.get("infd", FLEET, namespace) or {})["status"]["replicas"] == 0
    scale(testbed, namespace, 1)

    def taken() -> tuple[bool | None, str]:
        nodes = [pod["spec"].get("nodeName") for pod in workers(testbed, namespace)]
        return (True if nodes == [warm] else None), str(nodes)

    until("the replica has the warm place", taken, 60)
    until("the balloon has another", lambda: moved(ballooned, warm), 120)
    assert len(node_pool.nodes(testbed)) == 2
    testbed.kubectl("-n", namespace, "delete", "infd", FLEET, "--wait=true", seconds=90)
    no_nodes(testbed, 120)


def workers(testbed: Testbed, namespace: str) -> list[Json]:
    return testbed.find("pods", namespace, "tilefleet.io/role=worker")


def moved(look: Callable[[], tuple[str | None, str]], warm: str) -> tuple[str | None, str]:
    """The balloon's node once it is another."""
    found, why = look()
    return (found if found not in (None, warm) else None), why
