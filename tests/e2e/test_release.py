"""The chart on a real API server: helm test, upgrade, rights used, uninstall."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fleets import cpu_fleet
from testbed import NAMESPACE, OPERATOR, RELEASE, Json, Testbed, is_leaving, until

OPERATOR_ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{OPERATOR}"


@pytest.fixture
def reinstalled(testbed: Testbed) -> Iterator[None]:
    """Whatever the test did, the next one finds the chart installed."""
    yield
    testbed.install()


def uids(testbed: Testbed, namespace: str) -> dict[str, str]:
    """Name -> UID of the pods that stay."""
    pods = [p for p in testbed.find("pods", namespace) if not is_leaving(p)]
    return {p["metadata"]["name"]: p["metadata"]["uid"] for p in pods}


def test_helm_test_serves_a_completion(testbed: Testbed) -> None:
    done = testbed.run("helm", "test", RELEASE, "-n", NAMESPACE, "--timeout", "5m", seconds=320)
    assert "Phase:          Succeeded" in done.stdout
    assert testbed.get("pod", f"{RELEASE}-test", NAMESPACE) is None


def test_upgrade_replaces_the_operator_and_no_worker(
    testbed: Testbed, namespace: str, reinstalled: None
) -> None:
    testbed.apply(cpu_fleet("kept", namespace))
    testbed.wait_ready("kept", namespace)
    workers = uids(testbed, namespace)
    operators = uids(testbed, NAMESPACE)
    testbed.install("--set", "podAnnotations.upgraded=yes")
    testbed.kubectl("-n", NAMESPACE, "rollout", "status", f"deployment/{OPERATOR}")
    assert not set(uids(testbed, NAMESPACE).values()) & set(operators.values())
    testbed.wait_ready("kept", namespace)
    assert uids(testbed, namespace) == workers


def test_wrong_value_is_refused_before_anything_changes(testbed: Testbed) -> None:
    revision = testbed.run("helm", "list", "-n", NAMESPACE, "-o", "json").stdout
    done = testbed.run(
        *("helm", "upgrade", RELEASE, "helm/tilefleet", "-n", NAMESPACE, "--set", "replica=3"),
        check=False,
    )
    assert done.returncode != 0
    assert "replica" in done.stderr
    assert testbed.run("helm", "list", "-n", NAMESPACE, "-o", "json").stdout == revision


def test_uninstall_leaves_fleets_and_their_definition(
    testbed: Testbed, namespace: str, reinstalled: None
) -> None:
    """Nothing else of the release stays; the workers go on serving, a new install adopts them."""
    testbed.apply(cpu_fleet("orphan", namespace))
    testbed.wait_ready("orphan", namespace)
    workers = uids(testbed, namespace)
    testbed.run("helm", "uninstall", RELEASE, "-n", NAMESPACE, "--wait", seconds=120)
    kinds = "deployments,pods,services,serviceaccounts,roles,rolebindings,configmaps,secrets"
    kinds += ",networkpolicies,poddisruptionbudgets,clusterroles,clusterrolebindings"

    def look() -> tuple[bool | None, str]:
        left = testbed.kubectl(
            *("-n", NAMESPACE, "get", kinds, "-o", "name"),
            *("-l", f"app.kubernetes.io/instance={RELEASE}"),
        )
        return (None if left else True), left

    until("nothing else of the release is left", look, 60)
    assert testbed.get("crd", "inferencedeployments.tilefleet.io") is not None
    assert testbed.get("infd", "orphan", namespace) is not None
    assert uids(testbed, namespace) == workers
    testbed.install()
    testbed.wait_ready("orphan", namespace)
    assert uids(testbed, namespace) == workers


def test_rights_granted_are_the_rights_used(
    testbed: Testbed, namespace: str, audit_log: Path
) -> None:
    """By the audit log: no request was forbidden, and over the session no write's verb is spare."""
    position = testbed.audit_position()
    testbed.apply(cpu_fleet("rights", namespace))
    testbed.wait_ready("rights", namespace)
    testbed.kubectl("-n", namespace, "delete", "infd", "rights")
    forbidden = {
        (e["verb"], e["requestURI"])
        for e in by_operator(testbed, position)
        if e["responseStatus"].get("code") == 403
    }
    assert forbidden == set()
    mine = by_operator(testbed, 0)
    used = {(e["verb"], resource(e)) for e in mine}
    # A server-side apply that creates is authorised as patch and as create.
    used |= {("create", resource(e)) for e in mine if e["responseStatus"].get("code") == 201}
    # Asked for by an admission plugin that not every cluster runs.
    used.add(("update", "inferencedeployments/finalizers"))
    assert granted_writes(testbed) - used == set()


def by_operator(testbed: Testbed, position: int) -> list[Json]:
    events = testbed.audit_events(position)
    return [e for e in events if e["user"]["username"] == OPERATOR_ACCOUNT]


def resource(event: Json) -> str:
    reference = event["objectRef"]
    sub = reference.get("subresource")
    return f"{reference['resource']}/{sub}" if sub else str(reference["resource"])


def granted_writes(testbed: Testbed) -> set[tuple[str, str]]:
    """(verb, resource) of every changing verb in the release's roles."""
    manifest = testbed.run("helm", "get", "manifest", RELEASE, "-n", NAMESPACE).stdout
    roles = [o for o in yaml.safe_load_all(manifest) if o and o["kind"] in ("Role", "ClusterRole")]
    return {
        (verb, name)
        for role in roles
        for rule in role["rules"]
        for name in rule["resources"]
        for verb in rule["verbs"]
        if verb not in ("get", "list", "watch")
    }
