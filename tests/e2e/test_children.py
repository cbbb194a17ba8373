"""What a fleet owns beside its pods, on a real cluster: accepted, honoured, repaired, removed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fleets import cpu_fleet
from testbed import Json, Testbed, TestbedError, until

MONITORS = "podmonitors.monitoring.coreos.com"
# PodMonitors are listed once a minute.
MONITOR_SECONDS = 120
OFF = ("--set", "workers.networkPolicy.enabled=false")
POLICY = ("networkpolicies", "networkpolicy")


@pytest.fixture
def restricted(testbed: Testbed, namespace: str) -> str:
    """The test's namespace, in which only pods within the restricted standard may run."""
    label = "pod-security.kubernetes.io/enforce=restricted"
    testbed.kubectl("label", "namespace", namespace, label)
    return namespace


def test_workers_serve_under_the_restricted_standard(testbed: Testbed, restricted: str) -> None:
    refused = testbed.run(
        *("kubectl", "-n", restricted, "run", "loose", "--image=loose", "--restart=Never"),
        check=False,
    )
    assert "violates PodSecurity" in refused.stderr, "the namespace refuses nothing"
    testbed.apply(cpu_fleet("strict", restricted))
    testbed.wait_ready("strict", restricted)
    (pod,) = testbed.pods("strict", restricted)
    assert pod["spec"]["serviceAccountName"] == "strict-worker"
    mounts = [m["mountPath"] for c in pod["spec"]["containers"] for m in c["volumeMounts"]]
    assert not [path for path in mounts if "serviceaccount" in path]


def test_a_node_drain_takes_one_replica_at_a_time(testbed: Testbed, namespace: str) -> None:
    """The eviction API, as kubectl drain and node autoscalers use it."""
    testbed.apply(cpu_fleet("budget", namespace, replicas=2))
    testbed.wait_ready("budget", namespace)

    def allows() -> tuple[bool | None, str]:
        status = (testbed.get("pdb", "budget", namespace) or {}).get("status", {})
        return (True if status.get("disruptionsAllowed") == 1 else None), str(status)

    until("the budget counts", allows, 60)
    first, second = testbed.pods("budget", namespace)
    assert evict(testbed, first)["kind"] == "Status"
    with pytest.raises(TestbedError, match="disruption budget"):
        evict(testbed, second)
    testbed.wait_ready("budget", namespace)


def evict(testbed: Testbed, pod: Json) -> Json:
    about = {key: pod["metadata"][key] for key in ("name", "namespace")}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": about}
    path = "/api/v1/namespaces/{namespace}/pods/{name}/eviction".format(**about)
    answer: Json = json.loads(
        testbed.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))
    )
    return answer


def test_drift_is_repaired(testbed: Testbed, namespace: str) -> None:
    testbed.apply(cpu_fleet("drift", namespace, replicas=0))

    def policy() -> tuple[Json | None, str]:
        found = testbed.get(POLICY[1], "drift", namespace)
        right = found is not None and len(found["spec"]["ingress"]) == 2
        return (found if right else None), str(found and found["spec"])

    until("the policy is there", policy, 60)
    open_all = '{"spec": {"ingress": [{}]}}'
    testbed.kubectl("-n", namespace, "patch", POLICY[1], "drift", "--type=merge", "-p", open_all)
    until("it is closed again", policy, 60)
    testbed.kubectl("-n", namespace, "delete", POLICY[1], "drift")
    until("it is there again", policy, 60)


def test_earlier_revisions_above_the_limit_are_forgotten(testbed: Testbed, namespace: str) -> None:
    obj = cpu_fleet("forget", namespace, 0, {"rollout": {"revisionHistoryLimit": 0}})
    testbed.apply(obj)
    first = until("a revision is recorded", lambda: records(testbed, namespace, set()), 60)
    obj["spec"]["engine"]["maxBatchTokens"] = 1024
    testbed.apply(obj)
    until("only the next one is recorded", lambda: records(testbed, namespace, first), 60)


def records(testbed: Testbed, namespace: str, before: set[str]) -> tuple[set[str] | None, str]:
    found = {one["metadata"]["name"] for one in testbed.find("controllerrevisions", namespace)}
    return (found if len(found) == 1 and not found & before else None), str(sorted(found))


@pytest.fixture
def without_policies(testbed: Testbed) -> Iterator[None]:
    """Whatever happens, the next test finds the chart as it was."""
    yield
    testbed.install()


def test_switched_off_policies_go_and_come_back(
    testbed: Testbed, namespace: str, without_policies: None
) -> None:
    testbed.apply(cpu_fleet("switch", namespace, replicas=0))

    def present(wanted: bool) -> Any:
        def look() -> tuple[bool | None, str]:
            there = testbed.get(POLICY[1], "switch", namespace) is not None
            return (True if there is wanted else None), f"there: {there}"

        return look

    until("the policy is there", present(True), 60)
    testbed.install(*OFF)
    until("the policy is gone", present(False), 90)
    testbed.install()
    until("the policy is back", present(True), 90)


@pytest.fixture
def definition(testbed: Testbed) -> Iterator[None]:
    """The cluster serves PodMonitors; any object of that kind is accepted."""
    if testbed.get("crd", MONITORS) is not None:
        yield
        return
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {
            "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        },
    }
    names = {"plural": "podmonitors", "singular": "podmonitor", "kind": "PodMonitor"}
    spec = {
        "group": "monitoring.coreos.com",
        "scope": "Namespaced",
        "names": names,
        "versions": [version],
    }
    testbed.apply(
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": MONITORS},
            "spec": spec,
        }
    )
    yield
    testbed.kubectl("delete", "crd", MONITORS, "--wait=true")


def test_monitors_exist_where_their_definition_does(
    testbed: Testbed, namespace: str, definition: None
) -> None:
    obj = cpu_fleet("watched", namespace, replicas=0)
    testbed.apply(obj)

    def look() -> tuple[Json | None, str]:
        found = testbed.run(
            *("kubectl", "-n", namespace, "get", MONITORS, "watched", "-o", "json"), check=False
        )
        return (json.loads(found.stdout) if found.returncode == 0 else None), found.stderr

    monitor = until("a PodMonitor is there", look, MONITOR_SECONDS)
    assert monitor["spec"]["podMetricsEndpoints"] == [{"path": "/metrics", "port": "admin"}]
    obj["spec"]["monitoring"] = {"podMonitor": "disabled"}
    testbed.apply(obj)

    def gone() -> tuple[bool | None, str]:
        found, why = look()
        return (True if found is None else None), why or "it is there"

    until("it is gone", gone, 60)
