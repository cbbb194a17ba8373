"""The chart on a real API server: helm test, upgrade, uninstall."""

from collections.abc import Iterator

import pytest
from fleets import cpu_fleet
from testbed import NAMESPACE, OPERATOR, RELEASE, Testbed, is_leaving, until


@pytest.fixture
def reinstalled(testbed: Testbed) -> Iterator[None]:
    """Whatever the test did, the next one finds the chart installed."""
    yield
    testbed.install()


COMPONENT = "app.kubernetes.io/component=operator"


def uids(testbed: Testbed, namespace: str, *selector: str) -> dict[str, str]:
    """Name -> UID of the pods that stay."""
    pods = [p for p in testbed.find("pods", namespace, *selector) if not is_leaving(p)]
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
    operators = uids(testbed, NAMESPACE, COMPONENT)
    testbed.install("--set", "podAnnotations.upgraded=yes")
    testbed.kubectl("-n", NAMESPACE, "rollout", "status", f"deployment/{OPERATOR}")
    assert operators
    assert not set(uids(testbed, NAMESPACE, COMPONENT).values()) & set(operators.values())
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
