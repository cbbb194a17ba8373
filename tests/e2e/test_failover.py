"""kill -9 of the leading operator in the middle of a create: the other one takes over."""

import collections
import datetime
import os
import signal
import time
from pathlib import Path

import pytest
from fleets import amd_fleet
from testbed import NAMESPACE, Json, Testbed, until

REPLICAS = 12
TAKEOVER_SECONDS = 20


def operator_process(pod: str) -> int:
    """Process id, as this machine numbers it, of the operator in a pod."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if b"tilefleet_operator" in command and f"POD_NAME={pod}".encode() in environment:
            return int(folder.name)
    pytest.fail(f"no process of operator pod {pod}")


def test_other_operator_takes_over_and_creates_no_pod_twice(
    testbed: Testbed, namespace: str, mi300x_nodes: list[str]
) -> None:
    leader = until("an operator leads", lambda: (testbed.leader(), "no holder"), 30)
    others = [
        p["metadata"]["name"]
        for p in testbed.find("pods", NAMESPACE, "app.kubernetes.io/component=operator")
        if not leader.startswith(p["metadata"]["name"])
    ]
    assert others, "there is only one operator"
    pod = next(
        p["metadata"]["name"]
        for p in testbed.find("pods", NAMESPACE, "app.kubernetes.io/component=operator")
        if leader.startswith(p["metadata"]["name"])
    )
    process = operator_process(pod)
    position = testbed.audit_position()
    testbed.apply(amd_fleet("takeover", namespace, replicas=REPLICAS, count=1))
    until("the first pod is created", lambda: first_create(testbed, position), 30, every=0.005)
    os.kill(process, signal.SIGKILL)
    killed, killed_at = time.monotonic(), time.time()
    created_before = len(creates(testbed, position))

    def taken() -> tuple[str | None, str]:
        holder = testbed.leader()
        return (holder if holder and holder != leader else None), f"{holder} holds the Lease"

    until("another operator holds the Lease", taken, TAKEOVER_SECONDS, every=0.1)
    takeover_seconds = time.monotonic() - killed
    until("all replicas run", lambda: all_running(testbed, namespace), 60)
    print(f"killed after {created_before} of {REPLICAS} creates, takeover {takeover_seconds:.1f} s")
    assert takeover_seconds < TAKEOVER_SECONDS
    made = collections.Counter(creates(testbed, position))
    assert set(made.values()) == {1}, made
    pods = testbed.pods("takeover", namespace)
    assert len(pods) == REPLICAS
    # The API server finishes a create whose client died, and logs it with no 201.
    interrupted = [p for p in pods if p["metadata"]["name"] not in made]
    assert all(created_at(pod) <= killed_at + 1 for pod in interrupted), (interrupted, killed_at)
    # A pod made twice would have been deleted in between.
    assert not fleet_events(testbed, position, "delete")


def created_at(pod: Json) -> float:
    """Seconds since the epoch, cut to whole ones as the API server does."""
    return datetime.datetime.fromisoformat(pod["metadata"]["creationTimestamp"]).timestamp()


def fleet_events(testbed: Testbed, position: int, *verbs: str) -> list[Json]:
    """What the audit log holds about the fleet's pods, for some verbs."""
    return [
        event
        for event in testbed.audit_events(position)
        if event["objectRef"].get("resource") == "pods"
        and not event["objectRef"].get("subresource")
        and event["verb"] in verbs
        and event["objectRef"].get("name", "").startswith("takeover-")
    ]


def creates(testbed: Testbed, position: int) -> list[str]:
    """Names of the fleet's pods for which the API server answered 201, once for each answer."""
    return [
        event["objectRef"]["name"]
        for event in fleet_events(testbed, position, "create", "patch")
        if event.get("responseStatus", {}).get("code") == 201
    ]


def first_create(testbed: Testbed, position: int) -> tuple[str | None, str]:
    made = creates(testbed, position)
    return (made[0] if made else None), "no pod was created"


def all_running(testbed: Testbed, namespace: str) -> tuple[list[Json] | None, str]:
    pods = testbed.pods("takeover", namespace)
    running = [p for p in pods if p["status"].get("phase") == "Running"]
    return (running if len(running) == REPLICAS else None), f"{len(running)} of {len(pods)} run"
