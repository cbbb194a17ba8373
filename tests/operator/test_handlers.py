"""The kopf shell: which events mark which keys dirty."""

from typing import Any

import kopf
import pytest

from tests.operator.builders import document
from tilefleet_operator.cache import ObjectCache
from tilefleet_operator.cluster import Cluster
from tilefleet_operator.handlers import Shell, configure
from tilefleet_operator.login import Login
from tilefleet_operator.resources import CHILDREN


class Harness:
    def __init__(self) -> None:
        self.dirty: list[tuple[str, str]] = []
        self.urgent: list[bool] = []
        self.relists = 0
        cluster = Cluster(None, ObjectCache())  # type: ignore[arg-type]
        login = Login("http://x", None, lambda: "token")
        self.shell = Shell(cluster, login, self.mark, self.relisted)

    def mark(self, key: tuple[str, str], *, urgent: bool = False) -> None:
        self.dirty.append(key)
        self.urgent.append(urgent)

    def relisted(self) -> None:
        self.relists += 1

    async def event(self, kind: str, body: dict[str, Any], event: str | None = "MODIFIED") -> None:
        await getattr(self.shell, f"_{kind}")(event={"type": event, "object": body})


def at(body: dict[str, Any], version: int) -> dict[str, Any]:
    return {**body, "metadata": {**body["metadata"], "resourceVersion": str(version)}}


def node(ready: str = "True", beat: str = "1", **labels: str) -> dict[str, Any]:
    condition = {"type": "Ready", "status": ready, "lastHeartbeatTime": beat}
    status = {"conditions": [condition], "allocatable": {"amd.com/gpu": "8"}, "images": []}
    return {"metadata": {"name": "n", "uid": "n", "labels": labels}, "spec": {}, "status": status}


def watchers(shell: Shell) -> list[Any]:
    return list(shell.registry()._watching.get_all_handlers())


@pytest.fixture
def harness() -> Harness:
    return Harness()


async def test_a_deployment_marks_itself(harness: Harness) -> None:
    await harness.event("deployment", at(document(), 1))
    assert harness.dirty == [("team", "llm")]
    await harness.event("deployment", at(document(), 1))
    assert len(harness.dirty) == 1, "an event that changes nothing is no news"
    await harness.event("deployment", at(document(), 2), "DELETED")
    assert len(harness.dirty) == 2


async def test_a_spec_without_its_answer_is_urgent(harness: Harness) -> None:
    """Its own status and the children that come after are not: nobody waits for those."""
    await harness.event("deployment", at(document(), 1), "ADDED")
    await harness.event("deployment", at(document() | {"status": {"observedGeneration": 1}}, 2))
    changed = document() | {"status": {"observedGeneration": 1}}
    changed["metadata"]["generation"] = 2
    await harness.event("deployment", at(changed, 3))
    assert harness.urgent == [True, False, True]


@pytest.mark.parametrize(
    ("change", "news"),
    [
        ({}, False),
        ({"generation": 3}, True),
        ({"uid": "another"}, True),
        ({"deletionTimestamp": "2026-01-01T00:00:00Z"}, True),
        ({"status": {"observedGeneration": 1}}, True),
    ],
)
async def test_the_echo_of_an_own_status_is_no_news(
    harness: Harness, change: dict[str, Any], news: bool
) -> None:
    status: Any = {"observedGeneration": 2}
    planned = document()
    planned["metadata"]["generation"] = 2
    echoes = harness.shell.cluster.echoes
    echoes.foresee(("team", "llm"), planned, status)
    changed = dict(change)
    shown = at(planned, 2) | {"status": changed.pop("status", status)}
    await harness.event("deployment", {**shown, "metadata": shown["metadata"] | changed})
    assert harness.dirty == [("team", "llm")] * news
    echoes.foresee(("team", "llm"), planned, status)
    echoes.forget(("team", "llm"))
    await harness.event("deployment", at(shown, 3))
    assert len(harness.dirty) == news + 1, "a round that waited for it wants to see it"


@pytest.mark.parametrize("plural", ["pods", *(child.plural for child in CHILDREN)])
async def test_a_child_marks_its_owner(harness: Harness, plural: str) -> None:
    labels = {"tilefleet.io/deployment": "llm"}
    metadata = {"name": "x", "namespace": "team", "uid": "u", "labels": labels}
    handlers = {handler.id: handler.fn for handler in watchers(harness.shell)}
    for version, event in enumerate(("ADDED", "DELETED"), start=1):
        body = at({"metadata": metadata}, version)
        await handlers[plural](event={"type": event, "object": body})
    assert harness.dirty == [("team", "llm")] * 2


async def test_a_heartbeat_of_a_node_marks_nobody(harness: Harness) -> None:
    amd = {"vendor": "amd", "products": ["MI300X"]}
    await harness.event("deployment", at(document(accelerator=amd), 1))
    await harness.event("node", at(node(), 1), "ADDED")
    harness.dirty.clear()
    await harness.event("node", at(node(beat="2"), 2))
    await harness.event("node", at(node(beat="3"), 3))
    assert harness.dirty == []


@pytest.mark.parametrize("change", [node(ready="False"), node(**{"amd.com/gpu.family": "AI"})])
async def test_a_node_that_changes_marks_amd_fleets_only(
    harness: Harness, change: dict[str, Any]
) -> None:
    cpu = document("cpu")
    cpu["metadata"]["uid"] = "other"
    await harness.event("deployment", at(document(accelerator={"vendor": "amd"}), 1))
    await harness.event("deployment", at(cpu, 1))
    await harness.event("node", at(node(), 1), "ADDED")
    harness.dirty.clear()
    await harness.event("node", at(change, 2))
    assert harness.dirty == [("team", "llm")]


async def test_a_broken_watch_asks_for_a_list(harness: Harness) -> None:
    """kopf lists again after 410 Gone, and says nothing of what was deleted meanwhile."""
    await harness.event("deployment", at(document(), 1), None)
    assert harness.relists == 1


async def test_kopf_stores_posts_and_scans_nothing() -> None:
    settings = kopf.OperatorSettings()
    await configure(settings)
    assert not settings.posting.enabled
    assert settings.scanning.disabled
    storage, body = settings.persistence.diffbase_storage, kopf.Body({"spec": {"replicas": 1}})
    assert (storage.build(body=body), storage.fetch(body=body)) == ({}, None)
    assert settings.watching.client_timeout is not None
    assert settings.watching.server_timeout is not None
    assert settings.watching.client_timeout > settings.watching.server_timeout


async def test_only_event_handlers_are_registered(harness: Harness) -> None:
    """Any other kind of handler would write annotations or finalizers."""
    registry = harness.shell.registry()
    assert len(watchers(harness.shell)) == 3 + len(CHILDREN)
    for others in (registry._changing, registry._spawning, registry._indexing):
        assert list(others.get_all_handlers()) == []


async def test_kopf_logs_in_as_the_client_does(harness: Harness) -> None:
    info = await harness.shell._login()
    assert (info.server, info.token) == ("http://x", "token")
    assert info.expiration is not None, "or a renewed token would never be read"
