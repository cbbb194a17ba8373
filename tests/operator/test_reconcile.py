"""One round of a key, and the worker that runs rounds; on a real cache and a recording executor."""

import asyncio
from typing import Any

import pytest

from tests.operator.builders import DEFAULTS, document
from tilefleet_operator.cache import ObjectCache
from tilefleet_operator.client import ListResult
from tilefleet_operator.cluster import Cluster
from tilefleet_operator.errors import ApiError, LeaseLost, NotFound, TooManyRequests
from tilefleet_operator.events import Owner
from tilefleet_operator.metrics import WorkerPoller
from tilefleet_operator.observed import History, node_view
from tilefleet_operator.plan import Apply, Plan
from tilefleet_operator.reconcile import Reconciler, work
from tilefleet_operator.resources import BY_KIND, Resource
from tilefleet_operator.telemetry import Telemetry
from tilefleet_operator.workqueue import WorkQueue

KEY = ("team", "llm")


class FakeLists:
    """Answers lists and gets from a dictionary: plural → objects."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Any]] = {}
        self.version = "1000"
        self.calls: list[str] = []

    async def list(
        self, resource: Resource, namespace: str | None = None, **selectors: str
    ) -> ListResult:
        self.calls.append(f"list {resource.plural} {namespace} {selectors}")
        return ListResult(tuple(self.objects.get(resource.plural, ())), self.version)

    async def get(self, resource: Resource, namespace: str, name: str) -> Any:
        self.calls.append(f"get {resource.plural}")
        for one in self.objects.get(resource.plural, ()):
            if one["metadata"]["name"] == name:
                return one
        raise NotFound(404, "NotFound", name)


class RecordingExecutor:
    def __init__(self) -> None:
        self.plans: list[tuple[Owner, Plan]] = []
        self.errors: list[Exception] = []

    async def execute(self, owner: Owner, plan: Plan) -> None:
        self.plans.append((owner, plan))
        if self.errors:
            raise self.errors.pop(0)


class Harness:
    def __init__(self) -> None:
        self.now = 0.0
        self.api, self.executor, self.telemetry = FakeLists(), RecordingExecutor(), Telemetry()
        self.cache = ObjectCache(clock=lambda: self.now)
        self.cluster = Cluster(self.api, self.cache)  # type: ignore[arg-type]
        poller = WorkerPoller(self.cluster.poll_targets, lambda _: None, self.telemetry)
        self.reconciler = Reconciler(
            self.cluster,
            self.executor,  # type: ignore[arg-type]
            poller,
            DEFAULTS,
            self.telemetry,
            wall=lambda: 1_800_000_000.0,
        )

    def see(self, plural: str, body: dict[str, Any], version: int = 1) -> dict[str, Any]:
        body["metadata"]["resourceVersion"] = str(version)
        self.cache.observe(plural, "MODIFIED", body)
        return body

    def see_fleet(self, **spec: Any) -> dict[str, Any]:
        return self.see("inferencedeployments", document(**spec))


def pod(name: str, owner: str = "cr-uid", **metadata: Any) -> dict[str, Any]:
    labels = {"tilefleet.io/deployment": "llm", "tilefleet.io/role": "worker"}
    base = {
        "name": name,
        "namespace": "team",
        "uid": f"uid-{name}",
        "labels": labels,
        "ownerReferences": [{"uid": owner, "controller": True}],
    }
    return {"metadata": base | metadata, "spec": {}, "status": {}}


@pytest.fixture
def harness() -> Harness:
    return Harness()


async def test_a_new_fleet_is_planned(harness: Harness) -> None:
    harness.see_fleet(replicas=2, autoscaling={"mode": "Manual"})
    await harness.reconciler.reconcile(KEY)
    ((owner, plan),) = harness.executor.plans
    assert owner == Owner("team", "llm", "cr-uid")
    assert [type(action) for action in plan.actions] == [Apply] * 7


async def test_no_plan_on_a_view_older_than_the_own_last_write(harness: Harness) -> None:
    harness.see_fleet()
    harness.cache.expect(KEY, "pods", "uid-new", "50")
    assert await harness.reconciler.reconcile(KEY) == 5.0
    assert harness.executor.plans == []
    skips = "tilefleet_operator_stale_plan_skips_total"
    assert harness.telemetry.registry.get_sample_value(skips) == 1


async def test_a_late_watch_is_replaced_by_a_list(harness: Harness) -> None:
    """The own pod is in the list though no watch showed it: it must not be created again."""
    fleet = harness.see_fleet(replicas=1, autoscaling={"mode": "Manual"})
    await harness.reconciler.reconcile(KEY)
    (created,) = [a for a in harness.executor.plans[0][1].actions if a.kind == "Pod"]
    body = pod(created.name)
    body["metadata"]["labels"] = dict(created.body["metadata"]["labels"])
    body["metadata"]["resourceVersion"] = "50"
    harness.api.objects = {"inferencedeployments": [fleet], "pods": [body]}
    harness.cache.expect(KEY, "pods", f"uid-{created.name}", "50")
    harness.now = 6.0
    await harness.reconciler.reconcile(KEY)
    assert "Pod" not in [a.kind for a in harness.executor.plans[1][1].actions]
    assert harness.cache.unmet(KEY) is None


async def test_a_fleet_that_is_gone_is_forgotten(harness: Harness) -> None:
    assert await harness.reconciler.reconcile(KEY) is None
    assert harness.executor.plans == []


async def test_an_object_that_an_older_schema_let_in_gets_a_status(harness: Harness) -> None:
    harness.see_fleet(accelerator={"vendor": "tpu"})
    await harness.reconciler.reconcile(KEY)
    ((_, plan),) = harness.executor.plans
    assert plan.actions == ()
    assert plan.status is not None
    valid = next(c for c in plan.status["conditions"] if c["type"] == "SpecValid")
    assert valid["status"] == "False"
    assert "tpu" in valid["message"]


async def test_a_full_list_prunes_ghosts(harness: Harness) -> None:
    harness.see_fleet()
    harness.see("pods", pod("ghost"))
    await harness.cluster.list_all()
    assert harness.cache.get("pods", "team", "ghost") is None
    assert harness.cache.get("inferencedeployments", "team", "llm") is None


async def test_a_list_of_some_namespaces_asks_each(harness: Harness) -> None:
    cluster = Cluster(harness.api, harness.cache, ["a", "b"])  # type: ignore[arg-type]
    await cluster.list_all()
    pods = [call for call in harness.api.calls if call.startswith("list pods")]
    assert [call.split()[2] for call in pods] == ["a", "b"]
    assert [call.split()[2] for call in harness.api.calls if " nodes " in call] == ["None"]


async def test_serving_and_draining_pods_are_polled_and_urgently_where_it_matters(
    harness: Harness,
) -> None:
    ready = {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}
    harness.see_fleet()
    harness.see("pods", {**pod("serving"), "status": ready})
    harness.see("pods", {**pod("starting"), "status": {"podIP": "10.0.0.2"}})
    harness.see("pods", {**pod("foreign", owner="other"), "status": ready})
    leaving = {**pod("draining"), "status": {"podIP": "10.0.0.3"}}
    leaving["metadata"]["labels"]["tilefleet.io/state"] = "draining"
    harness.see("pods", leaving)
    ending = pod("ending", deletionTimestamp="2026-01-01T00:00:00Z")
    harness.see("pods", {**ending, "status": ready})
    target = harness.cluster.poll_targets()[KEY]
    assert [view.name for view in target.pods] == ["draining", "serving"]
    assert target.urgent
    harness.see("inferencedeployments", document(autoscaling={"mode": "Manual"}), 2)
    assert harness.cluster.poll_targets()[KEY].urgent, "one drains"
    leaving["metadata"]["labels"]["tilefleet.io/state"] = "active"
    harness.see("pods", leaving, 3)
    target = harness.cluster.poll_targets()[KEY]
    assert ([view.name for view in target.pods], target.urgent) == (["serving"], False)


async def test_devices_held_by_others_count(harness: Harness) -> None:
    def using(name: str, count: str, **metadata: Any) -> dict[str, Any]:
        resources = {"limits": {"amd.com/gpu": count}}
        spec = {"nodeName": "n1", "containers": [{"resources": resources}]}
        return {**pod(name, **metadata), "spec": spec}

    foreign = using("theirs", "3", labels={})
    harness.api.objects = {"pods": [foreign, pod("no-gpu", labels={}), using("ours", "1")]}
    assert await harness.cluster.list_foreign()
    assert not await harness.cluster.list_foreign()
    harness.see("pods", using("ours", "1"))
    assert harness.cluster.device_use() == {"n1": {"amd.com/gpu": 4.0}}


async def test_nodes_are_the_same_tuple_until_one_changes(harness: Harness) -> None:
    body = {"metadata": {"name": "n1", "uid": "n1"}, "spec": {}, "status": {}}
    harness.see("nodes", body)
    first = harness.cluster.nodes()
    assert harness.cluster.nodes() is first
    assert first == (node_view(body),)
    harness.see("nodes", {**body, "spec": {"unschedulable": True}}, 2)
    assert harness.cluster.nodes() != first


async def run_worker(harness: Harness, queue: WorkQueue, runs: int) -> asyncio.Task[None]:
    task = asyncio.create_task(work(queue, harness.reconciler, harness.telemetry))
    async with asyncio.timeout(5):
        while len(harness.executor.plans) < runs and not task.done():
            await asyncio.sleep(0.005)
    return task


@pytest.mark.parametrize(
    "error",
    [
        ApiError(500, "InternalError", "broken"),
        ExceptionGroup("writes", [ApiError(0, "Unreachable", "no answer")]),
        KeyError("a defect of ours"),
    ],
)
async def test_an_error_costs_the_key_its_backoff_and_nothing_else(
    harness: Harness, error: Exception
) -> None:
    harness.see_fleet()
    harness.executor.errors = [error]
    queue = WorkQueue()
    queue.add(KEY)
    task = await run_worker(harness, queue, 2)
    assert not task.done()
    task.cancel()
    count = harness.telemetry.registry.get_sample_value
    name = "tilefleet_operator_reconcile_duration_seconds_count"
    assert count(name, {"result": "error"}) == 1


async def test_what_the_api_server_asked_for_is_waited(harness: Harness) -> None:
    harness.see_fleet()
    wait = TooManyRequests(429, "TooManyRequests", "slow", retry_after_seconds=0.4)
    harness.executor.errors = [ExceptionGroup("writes", [ApiError(500, "x", "y"), wait])]
    queue = WorkQueue()
    queue.add(KEY)
    started = asyncio.get_running_loop().time()
    task = await run_worker(harness, queue, 2)
    assert asyncio.get_running_loop().time() - started >= 0.4
    task.cancel()


async def test_a_lost_lease_ends_the_worker(harness: Harness) -> None:
    harness.see_fleet()
    harness.executor.errors = [LeaseLost("gone")]
    queue = WorkQueue()
    queue.add(KEY)
    task = await run_worker(harness, queue, 2)
    with pytest.raises(LeaseLost):
        await task


async def test_node_autoscalers_are_heard_only_while_pods_have_no_node(harness: Harness) -> None:
    harness.see_fleet()
    placed = pod("llm-0")
    placed["spec"] = {"nodeName": "n1"}
    harness.see("pods", placed)
    assert await harness.cluster.list_reactions() == set()
    assert harness.api.calls == []
    waits = pod("llm-1")
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    waits["status"] = {"conditions": [scheduled]}
    harness.see("pods", waits)
    harness.api.objects["events"] = [
        {
            "involvedObject": {"uid": uid},
            "reason": "Nominated",
            "message": "nodeclaim/a",
            "source": {"component": "karpenter"},
            "lastTimestamp": "2026-11-24T11:10:19Z",
        }
        for uid in ("uid-llm-1", "uid-of-another")
    ]
    assert await harness.cluster.list_reactions() == {KEY}
    assert all("events team" in call for call in harness.api.calls)
    assert len(harness.api.calls) == 4
    assert await harness.cluster.list_reactions() == set(), "nothing new"
    deployment = harness.cluster.deployment(KEY)
    assert deployment is not None
    snapshot = harness.cluster.gather(deployment, {}, History())
    assert [str(r) for r in snapshot.reactions.values()] == ["karpenter: nodeclaim/a"]
    harness.api.objects["events"] = []
    assert await harness.cluster.list_reactions() == {KEY}, "the Event is gone"


async def test_an_answer_that_no_plan_reads_back_is_foreseen(harness: Harness) -> None:
    """Its echo needs no round, unless another round waited for it."""
    await harness.reconciler.reconcile(KEY)
    fleet = harness.see_fleet(replicas=0, autoscaling={"mode": "Manual"})
    await harness.reconciler.reconcile(KEY)
    first = harness.executor.plans[-1][1]
    assert not harness.cluster.echoes.is_one(KEY, fleet | {"status": first.status}), (
        "children came too"
    )
    for action in first.actions:
        body = {**action.body, "metadata": {**action.body["metadata"], "uid": action.name}}
        harness.see(BY_KIND[action.kind].plural, body)
    changed = fleet | {"status": first.status}
    changed["metadata"]["generation"] = 2
    harness.see("inferencedeployments", changed, 2)
    await harness.reconciler.reconcile(KEY)
    answer = harness.executor.plans[-1][1].status
    assert answer is not None
    assert answer["observedGeneration"] == 2
    echo = changed | {"status": answer}
    assert harness.cluster.echoes.is_one(KEY, echo)
    await harness.reconciler.reconcile(KEY)
    harness.cache.expect(KEY, "inferencedeployments", "cr-uid", "3")
    await harness.reconciler.reconcile(KEY)
    assert not harness.cluster.echoes.is_one(KEY, echo)


async def test_counts_alone_are_reported_once_a_second(harness: Harness) -> None:
    """What answers a spec or turns a condition is written at once."""
    now = [100.0]
    harness.reconciler.clock = lambda: now[0]
    harness.see_fleet(replicas=1, autoscaling={"mode": "Manual"})
    await harness.reconciler.reconcile(KEY)
    first = harness.executor.plans[-1][1]
    assert first.status is not None
    for action in first.actions:
        body = {**action.body, "metadata": {**action.body["metadata"], "uid": action.name}}
        harness.see(BY_KIND[action.kind].plural, body)

    def see(generation: int, version: int, status: Any) -> None:
        spec = {"replicas": 1, "autoscaling": {"mode": "Manual"}}
        seen = document(**spec) | {"status": status}
        seen["metadata"]["generation"] = generation
        harness.see("inferencedeployments", seen, version)

    see(1, 2, first.status)
    now[0] += 0.4
    wait = await harness.reconciler.reconcile(KEY)
    held = harness.executor.plans[-1][1]
    assert (held.status, held.actions, wait) == (None, (), pytest.approx(0.6))
    now[0] += 0.6
    await harness.reconciler.reconcile(KEY)
    counted = harness.executor.plans[-1][1]
    assert counted.status is not None
    assert (first.status["replicas"], counted.status["replicas"]) == (0, 1)
    see(2, 3, first.status)
    await harness.reconciler.reconcile(KEY)
    answered = harness.executor.plans[-1][1]
    assert answered.status is not None
    assert answered.status["observedGeneration"] == 2
