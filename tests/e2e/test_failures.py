"""What goes wrong is said on the object with the remedy, and what serves goes on serving."""

import sys

from fleets import amd_fleet, cpu_fleet
from testbed import Json, Testbed, condition, is_ready, until


def reported(
    testbed: Testbed, namespace: str, fleet: str, kind: str, reason: str, seconds: float = 120
) -> Json:
    """A condition once it has this reason."""

    def look() -> tuple[Json | None, str]:
        found = condition(testbed.get("infd", fleet, namespace) or {}, kind)
        return (found if found.get("reason") == reason else None), str(found)

    return until(f"{kind} of {fleet} says {reason}", look, seconds)


def plugin(testbed: Testbed, *arguments: str) -> str:
    """What `kubectl tilefleet` prints."""
    program = "import sys; from tilefleet_operator.cli.kubectl import main; sys.exit(main())"
    return testbed.run(sys.executable, "-c", program, *arguments).stdout


def serving(testbed: Testbed, namespace: str, fleet: str) -> set[str]:
    """UIDs of the fleet's ready pods."""
    pods = testbed.pods(fleet, namespace)
    return {pod["metadata"]["uid"] for pod in pods if is_ready(pod)}


def test_missing_model_is_named_and_its_correction_heals(testbed: Testbed, namespace: str) -> None:
    obj = cpu_fleet("wrong", namespace)
    right = dict(obj["spec"]["model"])
    obj["spec"]["model"] = {"uri": "file:///models/none"}
    testbed.apply(obj)
    said = reported(testbed, namespace, "wrong", "Degraded", "ModelUnavailable")
    assert "the folder /models/none does not exist" in said["message"]
    assert "correct spec.model" in said["message"]
    ready = condition(testbed.get("infd", "wrong", namespace) or {}, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "Failed")
    obj["spec"]["model"] = right
    testbed.apply(obj)
    testbed.wait_ready("wrong", namespace)
    reported(testbed, namespace, "wrong", "Degraded", "None")


def test_revision_that_cannot_start_stops_and_undo_brings_the_old_one_back(
    testbed: Testbed, namespace: str
) -> None:
    """The replica that served before serves all the time: same pod, never restarted."""
    obj = cpu_fleet("stuck", namespace, spec={"rollout": {"progressDeadline": "15s"}})
    testbed.apply(obj)
    testbed.wait_ready("stuck", namespace)
    before = serving(testbed, namespace, "stuck")
    testbed.kubectl(
        *("-n", namespace, "patch", "infd", "stuck", "--type=merge"),
        *("-p", '{"spec": {"engine": {"args": ["--no-such-flag"]}}}'),
    )
    said = reported(testbed, namespace, "stuck", "Progressing", "ProgressDeadlineExceeded")
    assert "0 of 1 replicas are ready with the new revision" in said["message"]
    assert "--no-such-flag" in said["message"]
    degraded = reported(testbed, namespace, "stuck", "Degraded", "InvalidConfiguration")
    assert "correct spec.engine" in degraded["message"]
    assert serving(testbed, namespace, "stuck") == before
    listed = plugin(testbed, "rollout", "history", "stuck", "-n", namespace).splitlines()
    assert [line.split()[0] for line in listed] == ["NUMBER", "1", "2"]
    plugin(testbed, "rollout", "undo", "stuck", "-n", namespace)
    reported(testbed, namespace, "stuck", "Progressing", "Complete")

    def alone() -> tuple[bool | None, str]:
        pods = testbed.pods("stuck", namespace)
        return (True if len(pods) == 1 else None), f"{len(pods)} pods"

    until("the pod that could not start is gone", alone, 60)
    assert serving(testbed, namespace, "stuck") == before


def test_image_that_is_not_there_is_named(testbed: Testbed, namespace: str) -> None:
    image = "127.0.0.1:1/none:1"
    testbed.apply(cpu_fleet("noimage", namespace, spec={"engine": {"image": image}}))
    said = reported(testbed, namespace, "noimage", "Degraded", "ImagePull")
    assert image in said["message"]
    assert "spec.engine.image" in said["message"]


def test_replica_of_a_node_that_vanished_comes_up_on_the_other(
    testbed: Testbed, namespace: str, mi300x_nodes: list[str]
) -> None:
    testbed.apply(amd_fleet("moved", namespace, replicas=1, count=8))

    def placed() -> tuple[str | None, str]:
        names = [p["spec"].get("nodeName") for p in testbed.pods("moved", namespace)]
        return (names[0] if names and names[0] in mi300x_nodes else None), str(names)

    first = until("the replica has a node", placed, 60)
    testbed.kubectl("delete", "node", first, "--wait=false")

    def elsewhere() -> tuple[str | None, str]:
        found, why = placed()
        return (found if found not in (None, first) else None), why

    assert until("it is on the other node", elsewhere, 120) != first
