"""The operator as a process against a real kube-apiserver, with the rights of the chart."""

import signal
import time
from collections.abc import Callable

import pytest

from tests.operator.apiserver import ApiServer, Namespace, Refused, until
from tests.operator.processes import FakeKubelet, OperatorProcess, ready_count

pytestmark = pytest.mark.apiserver

Start = Callable[[str], OperatorProcess]
TAKEOVER_SECONDS = 20
# More than the burst of writes, so that the leader can be killed in the middle.
REPLICAS = 180
QUIET_SECONDS = 15


def is_ready(namespace: Namespace, fleet: str, replicas: int) -> Callable[[], bool]:
    def check() -> bool:
        ready = namespace.conditions(fleet).get("Ready", {})
        status = namespace.status(fleet)
        return ready.get("status") == "True" and status.get("readyReplicas") == replicas

    return check


def slots(namespace: Namespace, fleet: str) -> list[str]:
    return sorted(pod["metadata"]["name"] for pod in namespace.pods(fleet))


def test_a_fleet_becomes_pods_and_a_service(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    created = namespace.fleet("fleet", replicas=3)
    until("the fleet is ready", is_ready(namespace, "fleet", 3))
    pods = namespace.pods("fleet")
    assert len(pods) == 3
    for pod in pods:
        (owner,) = pod["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (created["metadata"]["uid"], True)
        assert pod["spec"]["containers"][0]["args"][0] == "serve"
    service = namespace.api.get(namespace.path("services", "fleet"))
    assert service["spec"]["selector"]["tilefleet.io/state"] == "active"
    conditions = namespace.conditions("fleet")
    assert all(c["observedGeneration"] == 1 for c in conditions.values())
    scale = namespace.api.get(namespace.path("inferencedeployments", "fleet") + "/scale")
    assert scale["status"]["replicas"] == 3


def test_a_deleted_pod_comes_back(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    namespace.fleet("fleet", replicas=2)
    until("the fleet is ready", is_ready(namespace, "fleet", 2))
    before = {pod["metadata"]["uid"] for pod in namespace.pods("fleet")}
    name = slots(namespace, "fleet")[0]
    namespace.api.delete(namespace.path("pods", name), grace_seconds=0)

    def replaced() -> bool:
        now = {pod["metadata"]["uid"] for pod in namespace.pods("fleet")}
        return len(now) == 2 and now != before

    until("another pod is there", replaced)
    until("the fleet is ready", is_ready(namespace, "fleet", 2))


def test_a_spec_change_rolls_without_losing_capacity(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    """maxSurge 1, maxUnavailable 0: never fewer than 3 ready, every old pod is drained first."""
    namespace.fleet("fleet", replicas=3)
    until("the fleet is ready", is_ready(namespace, "fleet", 3))
    old = {pod["metadata"]["uid"] for pod in namespace.pods("fleet")}
    path = namespace.path("inferencedeployments", "fleet")
    namespace.api.merge(path, {"spec": {"engine": {"image": "worker:2"}}})
    seen: list[tuple[int, int]] = []

    def rolled() -> bool:
        pods = namespace.pods("fleet")
        active = [p for p in pods if p["metadata"]["labels"]["tilefleet.io/state"] == "active"]
        seen.append((ready_count(active), len(active)))
        images = {pod["spec"]["containers"][0]["image"] for pod in pods}
        now = {pod["metadata"]["uid"] for pod in pods}
        return images == {"worker:2"} and len(pods) == 3 and not now & old

    until("all pods are new", rolled, 90)
    until("the fleet is ready", is_ready(namespace, "fleet", 3))
    assert min(ready for ready, _ in seen) >= 3, seen
    assert max(total for _, total in seen) <= 4, seen
    until("the old pods are gone", lambda: len(kubelet.drained_before_delete) == 3)
    assert kubelet.drained_before_delete == [True] * 3
    until(
        "the rollout is complete",
        lambda: namespace.conditions("fleet")["Progressing"]["reason"] == "Complete",
    )
    reasons = [reason for reason, _ in namespace.events("fleet")]
    assert reasons.count("RolloutStarted") == 1
    assert reasons.count("RolloutComplete") == 1


def test_a_converged_fleet_causes_no_write(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    """Also while its workers are polled every 2 s: mode Auto."""
    namespace.fleet("fleet", replicas=2)
    namespace.fleet("auto", autoscaling={"mode": "Auto", "minReplicas": 2, "maxReplicas": 3})
    until("the fleets are ready", is_ready(namespace, "fleet", 2))
    until("the fleets are ready", is_ready(namespace, "auto", 2))
    until(
        "the workers are polled",
        lambda: namespace.conditions("auto")["MetricsAvailable"]["status"] == "True",
    )
    last = [time.monotonic(), namespace.api.audit_position()]

    def quiet() -> bool:
        if namespace.api.writes(int(last[1])):
            last[:] = [time.monotonic(), namespace.api.audit_position()]
        return time.monotonic() - last[0] > QUIET_SECONDS

    until("the operator writes nothing", quiet, 60, 0.5)
    assert operator.leads()


def test_a_killed_leader_is_replaced_and_no_pod_is_created_twice(
    namespace: Namespace, start: Start
) -> None:
    leader = start("operator-a")
    leader.wait_leads()
    follower = start("operator-b")
    until("the follower is up", lambda: follower.http(follower.probe_port, "/readyz")[0] == 200)
    position = namespace.api.audit_position()
    namespace.fleet("fleet", replicas=REPLICAS)
    until("the create is under way", lambda: len(namespace.pods("fleet")) >= 3, every=0.001)
    leader.signal(signal.SIGKILL)
    killed = time.monotonic()
    before = len(namespace.pods("fleet"))
    until("the other leads", follower.leads, TAKEOVER_SECONDS)
    print(f"the other leads {time.monotonic() - killed:.1f} s after kill -9; {before} pods then")
    until("all pods are there", lambda: len(namespace.pods("fleet")) >= REPLICAS)
    assert before < REPLICAS, "the leader was killed too late to prove anything"
    time.sleep(2)
    names = slots(namespace, "fleet")
    assert sorted(int(name.rpartition("-")[2]) for name in names) == list(range(REPLICAS))
    pods = [
        entry
        for entry in namespace.api.audit(position)
        if (entry.get("objectRef") or {}).get("resource") == "pods"
    ]
    assert not [entry for entry in pods if entry["verb"] == "delete"]
    # A create that was cut by the kill may have landed without its answer being logged.
    created = [e["objectRef"]["name"] for e in pods if e["responseStatus"]["code"] == 201]
    assert len(created) == len(set(created))


def test_a_stopped_leader_hands_over_at_once(namespace: Namespace, start: Start) -> None:
    leader = start("operator-a")
    leader.wait_leads()
    follower = start("operator-b")
    until("the follower is up", lambda: follower.http(follower.probe_port, "/readyz")[0] == 200)
    leader.signal(signal.SIGTERM)
    stopped = time.monotonic()
    until("the other leads", follower.leads, 20)
    # Far below the 10 s of the Lease: it was released. The follower looks every 2 s.
    assert time.monotonic() - stopped < 8
    assert leader.process.wait(timeout=10) == 0


def test_a_leader_that_was_frozen_writes_nothing_afterwards(
    namespace: Namespace, start: Start
) -> None:
    leader = start("operator-a")
    leader.wait_leads()
    follower = start("operator-b")
    until("the follower is up", lambda: follower.http(follower.probe_port, "/readyz")[0] == 200)
    leader.signal(signal.SIGSTOP)
    until("the other leads", follower.leads, TAKEOVER_SECONDS)
    namespace.fleet("fleet", replicas=2)
    until("pods are there", lambda: len(namespace.pods("fleet")) == 2)
    position = namespace.api.audit_position()
    leader.signal(signal.SIGCONT)
    assert leader.process.wait(timeout=20) == 1
    assert namespace.api.writes(position, user="operator-a") == []
    assert follower.leads()


def test_a_service_of_somebody_else_is_left_alone_and_said(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    theirs = {"metadata": {"name": "fleet"}, "spec": {"ports": [{"port": 80}]}}
    before = namespace.api.create(namespace.path("services"), theirs)
    namespace.fleet("fleet")

    def said() -> bool:
        conditions = namespace.conditions("fleet").values()
        return any("belongs to somebody else" in c.get("message", "") for c in conditions)

    until("a condition says it", said)
    now = namespace.api.get(namespace.path("services", "fleet"))
    assert now["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    namespace.api.delete(namespace.path("services", "fleet"))
    until("the fleet has its Service", lambda: namespace_service_is_ours(namespace, "fleet"), 20)


def namespace_service_is_ours(namespace: Namespace, name: str) -> bool:
    try:
        found = namespace.api.get(namespace.path("services", name))
    except Refused:
        return False
    return bool(found["metadata"].get("ownerReferences"))


def test_a_quota_is_said_on_the_object_and_then_overcome(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"pods": "0"}}}
    namespace.api.create(namespace.path("resourcequotas"), quota)
    status = {"status": {"hard": {"pods": "0"}, "used": {"pods": "0"}}}
    namespace.api.merge(namespace.path("resourcequotas", "few") + "/status", status)
    namespace.fleet("fleet")
    until(
        "an Event says it",
        lambda: any(
            reason == "WriteFailed" and "exceeded quota" in message
            for reason, message in namespace.events("fleet")
        ),
    )
    namespace.api.delete(namespace.path("resourcequotas", "few"))
    until("the fleet is ready", is_ready(namespace, "fleet", 1), 60)


def test_load_on_the_workers_raises_the_fleet(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    """The numbers of /stats reach the decision: a replica that is full and queues is not enough."""
    namespace.fleet("fleet", autoscaling={"mode": "Auto", "minReplicas": 1, "maxReplicas": 3})
    until("the fleet is ready", is_ready(namespace, "fleet", 1))

    def loaded() -> bool:
        for worker in list(kubelet.workers.values()):
            worker.counters["arrivals"] += 4
            worker.counters["prompt_tokens_computed"] += 400
            worker.counters["generated_tokens"] += 200
            worker.counters["completions"] += 2
            worker.counters["steps"] += 20
            worker.counters["busy_seconds"] += 0.5
            worker.gauges.update(
                running=256, waiting=100, waiting_prompt_tokens=10_000, oldest_wait_seconds=20.0
            )
        return int(namespace.status("fleet").get("desiredReplicas", 0)) > 1

    until("the fleet grows", loaded, 60, 0.5)
    until("an Event says why", lambda: "ScaledUp" in dict(namespace.events("fleet")))


def test_the_ports_tell_health_and_metrics(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet, start: Start
) -> None:
    follower = start("operator-b")
    until("the follower is up", lambda: follower.http(follower.probe_port, "/readyz")[0] == 200)
    assert follower.http(follower.probe_port, "/healthz") == (200, "ok\n")
    assert operator.http(operator.probe_port, "/healthz") == (200, "ok\n")
    assert operator.metric("tilefleet_operator_leader") == 1
    assert follower.metric("tilefleet_operator_leader") == 0
    namespace.fleet("fleet", replicas=2)
    until("the fleet is ready", is_ready(namespace, "fleet", 2))
    name = namespace.name
    series = f'tilefleet_inferencedeployment_desired_replicas{{name="fleet",namespace="{name}"}}'
    until("the fleet has its series", lambda: operator.metric(series) == 2)
    namespace.api.delete(namespace.path("inferencedeployments", "fleet"))
    until(
        "the series is gone",
        lambda: series not in operator.http(operator.metrics_port, "/metrics")[1],
    )


def test_the_chart_grants_what_was_used(apiserver: ApiServer) -> None:
    """Runs last: no request of any operator above was forbidden."""
    forbidden = [
        (entry["verb"], entry["requestURI"])
        for entry in apiserver.audit()
        if entry["responseStatus"]["code"] in (401, 403)
        and "exceeded quota" not in entry["responseStatus"].get("message", "")
    ]
    assert forbidden == []
