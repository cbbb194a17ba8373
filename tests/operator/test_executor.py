"""Carrying out a plan: order, independence of errors, expectations, events; on a recording API."""

import asyncio
from typing import Any

import pytest

from tilefleet_operator.cache import ObjectCache
from tilefleet_operator.client import ListResult
from tilefleet_operator.errors import Conflict, Forbidden, LeaseLost, NotFound, Unprocessable
from tilefleet_operator.events import Owner
from tilefleet_operator.executor import PARALLEL, Executor
from tilefleet_operator.plan import Apply, Delete, Drain, Plan
from tilefleet_operator.resources import DEPLOYMENTS, Resource
from tilefleet_operator.telemetry import Telemetry

OWNER = Owner("ns", "fleet", "cr-uid")


class RecordingApi:
    """Accepts every write, keeps it in order, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.bodies: list[Any] = []
        self.failures: dict[tuple[str, str], Exception] = {}
        self.services: dict[str, Any] = {}
        self.living: list[str] = []
        self.owner_gone = False
        self.gets = 0
        self.marks: dict[str, str] = {}
        self.grace_seconds = 30
        self.version = 100

    def _call(self, verb: str, kind: str, name: str, body: Any = None) -> None:
        self.calls.append((verb, kind, name))
        self.bodies.append(body)
        self.version += 1
        if (verb, name) in self.failures:
            raise self.failures[verb, name]

    async def get(self, resource: Resource, namespace: str, name: str) -> Any:
        self.gets += 1
        if resource is DEPLOYMENTS:
            if self.owner_gone:
                raise NotFound(404, "NotFound", name)
            return {"metadata": {"name": name, "uid": OWNER.uid, "resourceVersion": "1"}}
        if name not in self.services:
            raise NotFound(404, "NotFound", name)
        return self.services[name]

    async def list(self, resource: Resource, namespace: str, *, field_selector: str) -> Any:
        found = [{"metadata": {"uid": uid}} for uid in self.living]
        return ListResult(tuple(found), str(self.version))

    async def apply(
        self, resource: Resource, body: Any, *, field_manager: str = "t", subresource: str = "",
        only_new: bool = False,
    ) -> Any:  # fmt: skip
        name = body["metadata"]["name"]
        if only_new and name in self.services:
            raise Conflict(409, "Conflict", "the object has been modified")
        if subresource and self.owner_gone:
            raise NotFound(404, "NotFound", name)
        self._call(subresource or "apply", resource.kind, name, body)
        uid = body["metadata"].get("uid") or "uid-" + body["metadata"]["name"]
        found = {"uid": uid, "namespace": "ns", "name": name, "resourceVersion": str(self.version)}
        return {"metadata": found | self.marks}

    async def create(self, resource: Resource, body: Any) -> Any:
        self._call("create", body.get("reason", resource.kind), body["metadata"]["name"], body)
        return body

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> Any:
        self._call("delete", resource.kind, name)
        if not self.grace_seconds:
            return {"kind": "Status"}
        metadata = {"uid": uid, "resourceVersion": str(self.version)}
        return {"metadata": {**metadata, "deletionGracePeriodSeconds": self.grace_seconds}}


class Harness:
    def __init__(self) -> None:
        self.api, self.cache, self.telemetry = RecordingApi(), ObjectCache(), Telemetry()
        self.drained: list[tuple[str, int, float]] = []
        self.executor = Executor(
            self.api,  # type: ignore[arg-type]
            self.cache,
            self.telemetry,
            self.drain,
            "me",
        )
        self.see_deployment(1)

    async def drain(self, ip: str, port: int, timeout_seconds: float) -> None:
        self.drained.append((ip, port, timeout_seconds))

    def see_deployment(self, version: int) -> None:
        metadata = {"name": "fleet", "namespace": "ns", "uid": "cr-uid"}
        body = {"metadata": {**metadata, "resourceVersion": str(version)}}
        self.cache.observe("inferencedeployments", "MODIFIED", body)

    def see_pod(self, name: str, version: int) -> None:
        labels = {"tilefleet.io/deployment": "fleet"}
        metadata = {"name": name, "namespace": "ns", "uid": f"uid-{name}", "labels": labels}
        body = {"metadata": {**metadata, "resourceVersion": str(version)}}
        self.cache.observe("pods", "MODIFIED", body)

    async def execute(self, *actions: Any, **rest: Any) -> None:
        await self.executor.execute(OWNER, Plan(actions=actions, **rest))


def child(kind: str, name: str) -> Apply:
    owner = {"uid": "cr-uid", "controller": True}
    metadata = {"name": name, "namespace": "ns", "ownerReferences": [owner]}
    return Apply({"apiVersion": "v1", "kind": kind, "metadata": metadata}, "wanted")


def leaving(name: str, ip: str | None = "10.0.0.1") -> Drain:
    body = {"metadata": {"name": name, "namespace": "ns", "uid": f"uid-{name}"}}
    return Drain(name, "ns", f"uid-{name}", ip, body, 30.0, "leaves")


def gone(name: str) -> Delete:
    return Delete(name, "ns", f"uid-{name}", "drained")


@pytest.fixture
def harness() -> Harness:
    return Harness()


async def test_event_status_drain_delete_create_in_this_order(harness: Harness) -> None:
    await harness.execute(
        child("Pod", "new"),
        gone("old"),
        leaving("leaving"),
        events=(("Normal", "ScaledUp", "1 to 2"),),
        status={"replicas": 2},
    )
    verbs = [(verb, kind) for verb, kind, _ in harness.api.calls]
    assert verbs == [
        ("create", "ScaledUp"),
        ("status", "InferenceDeployment"),
        ("apply", "Pod"),
        ("delete", "Pod"),
        ("apply", "Pod"),
    ]
    assert [name for _, _, name in harness.api.calls[2:]] == ["leaving", "old", "new"]
    assert harness.drained == [("10.0.0.1", 8001, 30.0)]
    assert harness.api.bodies[1]["metadata"]["uid"] == "cr-uid"
    assert harness.api.gets == 0, "the answer to the status says that the fleet is there"


async def test_a_pod_without_address_is_relabelled_but_not_called(harness: Harness) -> None:
    await harness.execute(leaving("leaving", ip=None))
    assert harness.api.calls == [("apply", "Pod", "leaving")]
    assert harness.drained == []


async def test_an_error_stops_no_other_action_and_not_the_status(harness: Harness) -> None:
    quota = Forbidden(403, "Forbidden", "exceeded quota: pods=10")
    invalid = Unprocessable(422, "Invalid", "bad image")
    harness.api.failures = {("apply", "a"): quota, ("apply", "b"): invalid}
    with pytest.raises(ExceptionGroup) as caught:
        await harness.execute(*(child("Pod", name) for name in "abc"), status={})
    assert set(caught.value.exceptions) == {quota, invalid}
    assert ("apply", "Pod", "c") in harness.api.calls
    assert ("status", "InferenceDeployment", "fleet") in harness.api.calls
    warned = [body for body in harness.api.bodies if body and body.get("reason") == "WriteFailed"]
    assert any("exceeded quota" in body["message"] for body in warned)
    value = harness.telemetry.registry.get_sample_value
    name = "tilefleet_operator_actions_total"
    assert value(name, {"action": "apply", "result": "error"}) == 2
    assert value(name, {"action": "apply", "result": "ok"}) == 1


async def test_a_lost_lease_ends_everything(harness: Harness) -> None:
    harness.api.failures = {("apply", "a"): LeaseLost("gone")}
    with pytest.raises(LeaseLost):
        await harness.execute(child("Service", "a"), child("Pod", "b"), status={})
    assert ("apply", "Pod", "b") not in harness.api.calls


async def test_a_defect_is_not_swallowed(harness: Harness) -> None:
    harness.api.failures = {("apply", "a"): KeyError("defect")}
    with pytest.raises(KeyError):
        await harness.execute(child("Pod", "a"))


async def test_every_write_is_expected_until_the_watch_shows_it(harness: Harness) -> None:
    await harness.execute(child("Pod", "a"))
    assert harness.cache.unmet(OWNER.key) is not None
    harness.see_pod("a", 101)
    assert harness.cache.unmet(OWNER.key) is None
    await harness.execute(status={"replicas": 1})
    assert harness.cache.unmet(OWNER.key) is not None
    harness.see_deployment(102)
    assert harness.cache.unmet(OWNER.key) is None


async def test_a_delete_with_grace_is_met_by_its_mark(harness: Harness) -> None:
    harness.see_pod("a", 50)
    await harness.execute(gone("a"))
    assert harness.cache.unmet(OWNER.key) is not None
    harness.see_pod("a", 101)
    assert harness.cache.unmet(OWNER.key) is None


async def test_a_delete_at_once_is_met_by_the_end(harness: Harness) -> None:
    harness.see_pod("a", 50)
    harness.api.grace_seconds = 0
    await harness.execute(gone("a"))
    harness.see_pod("a", 101)
    assert harness.cache.unmet(OWNER.key) is not None


async def test_no_pod_is_made_for_a_fleet_that_is_gone(harness: Harness) -> None:
    """Its pods' end may be seen before its own: each resource has a watch of its own."""
    harness.api.owner_gone = True
    await harness.execute(child("Service", "fleet"), child("Pod", "b"), status={})
    assert harness.api.calls == []
    assert harness.cache.get("inferencedeployments", "ns", "fleet") is None


async def test_no_pod_is_made_for_a_fleet_that_is_being_deleted(harness: Harness) -> None:
    harness.api.marks = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
    await harness.execute(child("Pod", "b"), status={})
    assert [verb for verb, _, _ in harness.api.calls] == ["status"]
    seen = harness.cache.get("inferencedeployments", "ns", "fleet")
    assert seen is not None
    assert "deletionTimestamp" in seen["metadata"], "the next plan must see it"


async def test_pods_are_made_though_the_status_is_refused(harness: Harness) -> None:
    """A status that cannot be written must not keep replicas from being made."""
    harness.api.failures = {("status", "fleet"): Unprocessable(422, "Invalid", "status")}
    with pytest.raises(ExceptionGroup):
        await harness.execute(child("Pod", "b"), status={})
    assert ("apply", "Pod", "b") in harness.api.calls
    assert harness.api.gets == 1, "whether the fleet is there"


async def test_a_large_fleet_takes_a_share_of_the_connections(harness: Harness) -> None:
    running = most = 0

    async def drain(ip: str, port: int, timeout_seconds: float) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    harness.executor.post_drain = drain
    await harness.execute(*(leaving(f"p{n}") for n in range(50)))
    assert 1 < most <= PARALLEL


async def test_no_pod_is_made_while_one_that_was_to_leave_stays(harness: Harness) -> None:
    """The plan counted on the room; other children do not wait."""
    harness.api.failures = {("delete", "a"): Forbidden(403, "Forbidden", "webhook")}
    with pytest.raises(ExceptionGroup):
        await harness.execute(gone("a"), child("Pod", "b"), child("Service", "s"), status={})
    assert ("apply", "Service", "s") in harness.api.calls
    assert ("apply", "Pod", "b") not in harness.api.calls
    assert ("status", "InferenceDeployment", "fleet") in harness.api.calls


@pytest.mark.parametrize("error", [NotFound(404, "NotFound", ""), Conflict(409, "Conflict", "uid")])
async def test_deleting_what_is_gone_corrects_the_view(harness: Harness, error: Exception) -> None:
    """A ghost in the cache must not be deleted for ever."""
    harness.see_pod("a", 50)
    harness.api.failures = {("delete", "a"): error}
    await harness.execute(gone("a"))
    assert harness.cache.children("pods", OWNER.key) == []
    assert harness.cache.unmet(OWNER.key) is None


async def test_a_conflict_over_a_pod_that_lives_does_not_hide_it(harness: Harness) -> None:
    """A conflict has other causes than our precondition; the pod must be deleted later."""
    harness.see_pod("a", 50)
    harness.api.failures = {("delete", "a"): Conflict(409, "Conflict", "try again")}
    harness.api.living = ["uid-a"]
    with pytest.raises(ExceptionGroup):
        await harness.execute(gone("a"))
    assert len(harness.cache.children("pods", OWNER.key)) == 1


async def test_a_service_of_somebody_else_is_not_taken_over(harness: Harness) -> None:
    metadata = {"name": "fleet", "namespace": "ns", "uid": "theirs", "resourceVersion": "7"}
    harness.api.services["fleet"] = {"metadata": metadata}
    with pytest.raises(ExceptionGroup) as caught:
        await harness.execute(child("Service", "fleet"), child("Pod", "a"))
    assert "not controlled by this object" in str(caught.value.exceptions[0])
    assert ("apply", "Service", "fleet") not in harness.api.calls
    assert ("apply", "Pod", "a") not in harness.api.calls, "the name may be its account's"
    assert harness.cache.get("services", "ns", "fleet") is not None, "the next plan must see it"


async def test_a_pod_of_somebody_else_is_not_taken_over(harness: Harness) -> None:
    metadata = {"name": "a", "namespace": "ns", "uid": "theirs", "resourceVersion": "7"}
    harness.api.services["a"] = {"metadata": metadata}
    with pytest.raises(ExceptionGroup, match="1 of the writes"):
        await harness.execute(child("Pod", "a"))
    assert ("apply", "Pod", "a") not in harness.api.calls
    assert harness.cache.get("pods", "ns", "a") is None, "no watch would show its end"


async def test_a_write_whose_answer_was_lost_is_repeated(harness: Harness) -> None:
    """It is there and ours, but no watch has shown it: the write is expected like any other."""
    pod = child("Pod", "a")
    harness.api.services["a"] = {"metadata": {**pod.body["metadata"], "uid": "uid-a"}}
    await harness.execute(pod)
    assert ("apply", "Pod", "a") in harness.api.calls
    assert harness.cache.unmet(OWNER.key) is not None


async def test_our_own_service_is_updated(harness: Harness) -> None:
    wanted = child("Service", "fleet")
    metadata = {**wanted.body["metadata"], "uid": "ours", "resourceVersion": "7"}
    harness.api.services["fleet"] = {"metadata": metadata}
    await harness.execute(wanted)
    assert ("apply", "Service", "fleet") in harness.api.calls


async def test_what_was_never_seen_is_created_with_one_request(harness: Harness) -> None:
    await harness.execute(child("Service", "fleet"), child("NetworkPolicy", "fleet"))
    assert (len(harness.api.calls), harness.api.gets) == (2, 0)


async def test_the_status_of_a_deleted_object_is_no_error(harness: Harness) -> None:
    harness.api.failures = {("status", "fleet"): NotFound(404, "NotFound", "")}
    await harness.execute(status={})
    assert harness.cache.unmet(OWNER.key) is None


async def names_of(harness: Harness, reason: str, message: str, type_: str) -> str:
    await harness.execute(events=((type_, reason, message),))
    return harness.api.calls[-1][2]


async def test_one_transition_is_one_event(harness: Harness) -> None:
    """A reconcile that was cut before its status posts the same event under the same name."""
    first = await names_of(harness, "ScaledUp", "1 to 2", "Normal")
    assert await names_of(harness, "ScaledUp", "1 to 2", "Normal") == first
    harness.see_deployment(2)
    assert await names_of(harness, "ScaledUp", "1 to 2", "Normal") != first


async def test_a_warning_is_repeated_only_when_it_says_something_new(harness: Harness) -> None:
    first = await names_of(harness, "CrashLoop", "exit 1", "Warning")
    harness.see_deployment(2)
    assert await names_of(harness, "CrashLoop", "exit 1", "Warning") == first
    assert await names_of(harness, "CrashLoop", "exit 2", "Warning") != first


async def test_events_that_exist_or_fail_are_no_error(harness: Harness) -> None:
    name = await names_of(harness, "ScaledUp", "1 to 2", "Normal")
    for error in (Conflict(409, "AlreadyExists", ""), Forbidden(403, "Forbidden", "")):
        harness.api.failures = {("create", name): error}
        await harness.execute(events=(("Normal", "ScaledUp", "1 to 2"),))


async def test_a_long_message_fits_an_event(harness: Harness) -> None:
    await harness.execute(events=(("Warning", "WriteFailed", "x" * 5000),))
    assert len(harness.api.bodies[-1]["message"]) == 1024


async def test_a_monitor_whose_definition_went_is_no_error(harness: Harness) -> None:
    missing = NotFound(404, "NotFound", "the server could not find the requested resource")
    harness.api.failures = {("apply", "fleet"): missing, ("apply", "a"): missing}
    await harness.execute(child("PodMonitor", "fleet"))
    with pytest.raises(ExceptionGroup):
        await harness.execute(child("Pod", "a"))
