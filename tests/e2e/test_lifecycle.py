"""A fleet on the real cluster: repair, roll, drain, delete, and silence once it has converged."""

import json
import subprocess
import sys
import time
from pathlib import Path

from fleets import cpu_fleet
from testbed import Json, Testbed, is_leaving, is_ready, until

CLIENT = "hack/demo/client.py"


def uids(pods: list[Json]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}


def test_deleted_pod_comes_back(testbed: Testbed, namespace: str) -> None:
    testbed.apply(cpu_fleet("repair", namespace))
    testbed.wait_ready("repair", namespace)
    (before,) = testbed.pods("repair", namespace)
    name = before["metadata"]["name"]
    testbed.kubectl("-n", namespace, "delete", "pod", name, "--wait=false")

    def look() -> tuple[Json | None, str]:
        ready = [p for p in testbed.pods("repair", namespace) if is_ready(p)]
        fresh = [p for p in ready if p["metadata"]["uid"] != before["metadata"]["uid"]]
        return (fresh[0] if fresh else None), f"{len(ready)} ready pods"

    until("a pod in place of the deleted one", look, 120)
    testbed.wait_ready("repair", namespace)


def test_spec_change_rolls_without_a_gap(testbed: Testbed, namespace: str) -> None:
    """maxUnavailable 0: at no time are fewer pods ready than wanted."""
    obj = cpu_fleet("roll", namespace, replicas=2)
    testbed.apply(obj)
    before = testbed.wait_ready("roll", namespace)
    old = testbed.pods("roll", namespace)
    assert len(old) == 2
    obj["spec"]["engine"]["maxBatchTokens"] = 1024
    testbed.apply(obj)
    fewest = 2

    def look() -> tuple[list[Json] | None, str]:
        nonlocal fewest
        pods = testbed.pods("roll", namespace)
        ready = [p for p in pods if is_ready(p)]
        fewest = min(fewest, len(ready))
        is_new = not uids(pods) & uids(old) and len(pods) == 2 == len(ready)
        return (pods if is_new else None), f"{len(pods)} pods, {len(ready)} ready"

    new = until("two pods of the new revision and no other", look, 240)
    assert fewest == 2
    revisions = {p["metadata"]["labels"]["tilefleet.io/revision"] for p in new}
    assert len(revisions) == 1
    after = testbed.wait_ready("roll", namespace)
    assert after["status"]["updateRevision"] in revisions
    assert before["status"]["updateRevision"] not in revisions
    arguments = " ".join(new[0]["spec"]["containers"][0]["args"])
    assert "--max-batch-tokens" in arguments
    assert "1024" in arguments


def test_replica_is_drained_before_it_is_deleted(testbed: Testbed, namespace: str) -> None:
    """An open stream of a replica that must go ends as if nothing had happened."""
    testbed.apply(cpu_fleet("drain", namespace))
    testbed.wait_ready("drain", namespace)
    with testbed.endpoint("drain", namespace) as url:
        streams = [open_stream(testbed, url, number) for number in range(6)]
        for stream in streams:
            assert stream.stdout is not None
            assert stream.stdout.read(1), "no first token"
        testbed.kubectl("-n", namespace, "scale", "infd", "drain", "--replicas=0")

        def draining() -> tuple[bool | None, str]:
            (now,) = testbed.pods("drain", namespace)
            state = now["metadata"]["labels"]["tilefleet.io/state"]
            return (True if state == "draining" else None), state

        until("the pod is marked as draining", draining, 10, every=0.1)
        assert any(stream.poll() is None for stream in streams), "the streams were too short"
        for stream in streams:
            text, errors = stream.communicate(timeout=60)
            assert stream.returncode == 0, errors
            assert "finish_reason length" in text

    def gone() -> tuple[bool | None, str]:
        left = testbed.find("pods", namespace)
        return (None if left else True), f"{len(left)} pods"

    until("the drained pod is deleted", gone, 60)


def open_stream(testbed: Testbed, url: str, number: int) -> "subprocess.Popen[str]":
    """A long streamed answer of the fleet's only replica."""
    return testbed.start(
        *(sys.executable, "-u", CLIENT, "stream", f"{url}/v1", "drain", f"Story number {number}"),
        *("--max-tokens", "400", "--ignore-eos"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_deleted_fleet_leaves_nothing(testbed: Testbed, namespace: str) -> None:
    testbed.apply(cpu_fleet("leave", namespace))
    testbed.wait_ready("leave", namespace)
    owned = everything(testbed, namespace)
    assert {kind for kind, _ in owned} >= {"Pod", "Service"}
    testbed.kubectl("-n", namespace, "delete", "infd", "leave", "--wait=true", seconds=90)

    def look() -> tuple[bool | None, str]:
        left = everything(testbed, namespace)
        return (None if left else True), str(sorted(left))

    until("nothing of the fleet is left", look, 90)


def everything(testbed: Testbed, namespace: str) -> set[tuple[str, str]]:
    """(kind, name) of every object in a namespace but what Kubernetes itself puts there."""
    kinds = testbed.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    kinds = [kind for kind in kinds if not kind.startswith("events")]
    listed = json.loads(testbed.kubectl("-n", namespace, "get", ",".join(kinds), "-o", "json"))
    found = {(item["kind"], item["metadata"]["name"]) for item in listed["items"]}
    return found - {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt")}


def test_converged_fleet_causes_no_writes(
    testbed: Testbed, namespace: str, audit_log: Path
) -> None:
    """60 s of the API server's audit log: the operator's account writes nothing about the fleet."""
    testbed.apply(cpu_fleet("quiet", namespace))
    testbed.wait_ready("quiet", namespace)
    time.sleep(15)  # the last status writes of the start and the conditions' hold time
    position = testbed.audit_position()
    time.sleep(60)
    writes = [
        (event["verb"], event["requestURI"])
        for event in testbed.audit_events(position)
        if event["user"]["username"].endswith(":tilefleet-operator")
        and event["verb"] not in ("get", "list", "watch")
        and event["objectRef"].get("namespace") == namespace
    ]
    renewals = [
        event
        for event in testbed.audit_events(position)
        if event["verb"] == "update" and event["objectRef"]["resource"] == "leases"
    ]
    assert renewals, "the audit log does not show the operator's Lease: the test sees nothing"
    assert writes == []


def test_deleting_pods_are_not_counted_as_replicas(testbed: Testbed, namespace: str) -> None:
    testbed.apply(cpu_fleet("count", namespace, replicas=2))
    status = testbed.wait_ready("count", namespace)["status"]
    assert (status["replicas"], status["readyReplicas"]) == (2, 2)
    assert not [p for p in testbed.find("pods", namespace) if is_leaving(p)]
    selector = status["selector"]
    assert uids(testbed.find("pods", namespace, selector)) == uids(testbed.pods("count", namespace))
