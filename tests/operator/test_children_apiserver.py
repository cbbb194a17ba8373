"""The children of a fleet on a real kube-apiserver: created, repaired, adopted, left alone."""

from collections.abc import Callable, Iterator

import pytest

from tests.operator.apiserver import ApiServer, Json, Namespace, Refused, until
from tests.operator.processes import FakeKubelet, OperatorProcess

pytestmark = pytest.mark.apiserver

CHILDREN = {
    "services": "fleet",
    "serviceaccounts": "fleet-worker",
    "poddisruptionbudgets": "fleet",
    "networkpolicies": "fleet",
}
DEFINITION = "podmonitors.monitoring.coreos.com"
# One list of PodMonitors a minute, and what a loaded machine adds.
MONITOR_SECONDS = 150


def child(namespace: Namespace, plural: str) -> Json:
    """A child by its plural; {} when it is not there."""
    try:
        return namespace.api.get(namespace.path(plural, CHILDREN.get(plural, "fleet")))
    except Refused:
        return {}


def owned(namespace: Namespace, plural: str) -> bool:
    owners = child(namespace, plural).get("metadata", {}).get("ownerReferences") or []
    return any(owner.get("controller") for owner in owners)


def all_owned(namespace: Namespace) -> bool:
    return all(owned(namespace, plural) for plural in CHILDREN)


def test_pods_pass_the_restricted_standard(namespace: Namespace, operator: OperatorProcess) -> None:
    """The admission of Kubernetes itself is the judge, and it does refuse what it should."""
    label = "pod-security.kubernetes.io/enforce"
    path = f"/api/v1/namespaces/{namespace.name}"
    namespace.api.merge(path, {"metadata": {"labels": {label: "restricted"}}})
    loose = {"metadata": {"name": "loose"}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    with pytest.raises(Refused, match="restricted"):
        namespace.api.create(namespace.path("pods"), loose)
    for vendor in ("cpu", "amd"):
        namespace.fleet(vendor, replicas=2, accelerator={"vendor": vendor})
    for vendor in ("cpu", "amd"):
        until("the pods are accepted", lambda vendor=vendor: len(namespace.pods(vendor)) == 2)
        assert not [text for reason, text in namespace.events(vendor) if reason == "WriteFailed"]


def test_every_child_is_there_and_comes_back(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    namespace.fleet("fleet", replicas=3)
    until("all children are there", lambda: all_owned(namespace))
    assert child(namespace, "poddisruptionbudgets")["spec"]["minAvailable"] == 2
    (pod, *_) = until("pods are there", lambda: namespace.pods("fleet"))
    assert pod["spec"]["serviceAccountName"] == "fleet-worker"
    before = {plural: child(namespace, plural)["metadata"]["uid"] for plural in CHILDREN}
    for plural, name in CHILDREN.items():
        namespace.api.delete(namespace.path(plural, name))

    def back() -> bool:
        return all_owned(namespace) and not any(
            child(namespace, plural)["metadata"]["uid"] == uid for plural, uid in before.items()
        )

    until("they are there again", back)


def test_drift_is_repaired_and_the_fields_of_others_stay(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    namespace.fleet("fleet")
    until("all children are there", lambda: all_owned(namespace))
    note = {"metadata": {"annotations": {"mesh.example/inject": "on"}}}
    edits: dict[str, Json] = {
        "services": {"spec": {"selector": {"tilefleet.io/state": "else"}}},
        "serviceaccounts": {
            "automountServiceAccountToken": True, "imagePullSecrets": [{"name": "theirs"}],
        },
        "poddisruptionbudgets": {"spec": {"minAvailable": 7}},
        "networkpolicies": {"spec": {"ingress": [{}]}},
    }  # fmt: skip
    for plural, edit in edits.items():
        namespace.api.merge(namespace.path(plural, CHILDREN[plural]), {**edit, **note})

    def repaired() -> bool:
        found = {plural: child(namespace, plural) for plural in CHILDREN}
        return (
            found["services"]["spec"]["selector"]["tilefleet.io/state"] == "active"
            and found["serviceaccounts"]["automountServiceAccountToken"] is False
            and found["poddisruptionbudgets"]["spec"]["minAvailable"] == 0
            and len(found["networkpolicies"]["spec"]["ingress"]) == 2
        )

    until("all is as it was", repaired)
    for plural in CHILDREN:
        annotations = child(namespace, plural)["metadata"]["annotations"]
        assert annotations == note["metadata"]["annotations"]
    assert child(namespace, "serviceaccounts")["imagePullSecrets"] == [{"name": "theirs"}]


def test_children_of_others_are_left_alone_until_they_are_handed_over(
    namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    theirs: dict[str, Json] = {
        "services": {"spec": {"ports": [{"name": "web", "port": 80}]}},
        "serviceaccounts": {},
        "poddisruptionbudgets": {"spec": {"minAvailable": 1, "selector": {}}},
        "networkpolicies": {"spec": {"podSelector": {}}},
    }
    before = {}
    for plural, body in theirs.items():
        about = {"metadata": {"name": CHILDREN[plural]}}
        made = namespace.api.create(namespace.path(plural), about | body)
        before[plural] = made["metadata"]["resourceVersion"]
    namespace.fleet("fleet")

    def said() -> bool:
        degraded = namespace.conditions("fleet").get("Degraded", {})
        kinds = ("Service fleet", "ServiceAccount fleet-worker", "PodDisruptionBudget fleet")
        message = degraded.get("message", "")
        return degraded.get("reason") == "NameConflict" and all(kind in message for kind in kinds)

    until("Degraded names every one", said)
    for plural in CHILDREN:
        assert child(namespace, plural)["metadata"]["resourceVersion"] == before[plural]
    assert namespace.pods("fleet") == [], "no pod under the account of somebody else"
    hand_over = {"metadata": {"annotations": {"tilefleet.io/adopt": "fleet"}}}
    for plural, name in CHILDREN.items():
        namespace.api.merge(namespace.path(plural, name), hand_over)
    until("all are adopted", lambda: all_owned(namespace), 60)
    until("a pod is there", lambda: namespace.pods("fleet"))
    until(
        "nothing is wrong",
        lambda: namespace.conditions("fleet")["Degraded"]["status"] == "False",
        60,
    )
    selector = child(namespace, "services")["spec"]["selector"]
    assert selector["tilefleet.io/deployment"] == "fleet"


@pytest.fixture
def definition(apiserver: ApiServer) -> Iterator[Callable[[], None]]:
    """Installs a definition of PodMonitors; it goes with the test."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema},
    }  # fmt: skip
    names = {"plural": "podmonitors", "singular": "podmonitor", "kind": "PodMonitor"}
    note = {"api-approved.kubernetes.io": "unapproved, for a test"}
    body = {
        "metadata": {"name": DEFINITION, "annotations": note},
        "spec": {
            "group": "monitoring.coreos.com", "scope": "Namespaced", "names": names,
            "versions": [version],
        },
    }  # fmt: skip
    yield lambda: apiserver.create(path, body) and None
    apiserver.delete(f"{path}/{DEFINITION}")


def test_monitors_come_with_their_definition_and_go_when_disabled(
    namespace: Namespace,
    operator: OperatorProcess,
    kubelet: FakeKubelet,
    definition: Callable[[], None],
) -> None:
    namespace.fleet("fleet")
    until("the fleet runs", lambda: all_owned(namespace))
    definition()
    until("a PodMonitor is there", lambda: owned(namespace, "podmonitors"), MONITOR_SECONDS)
    (endpoint,) = child(namespace, "podmonitors")["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "admin", "path": "/metrics"}
    path = namespace.path("podmonitors", "fleet")
    namespace.api.merge(path, {"spec": {"podMetricsEndpoints": []}})
    until(
        "it is repaired",
        lambda: child(namespace, "podmonitors")["spec"]["podMetricsEndpoints"],
        MONITOR_SECONDS,
    )
    off = {"spec": {"monitoring": {"podMonitor": "disabled"}}}
    namespace.api.merge(namespace.path("inferencedeployments", "fleet"), off)
    until("it is gone", lambda: not child(namespace, "podmonitors"))


def test_no_request_was_forbidden(apiserver: ApiServer) -> None:
    """Runs last: the chart grants what the tests above needed."""
    forbidden = [
        (entry["verb"], entry["requestURI"])
        for entry in apiserver.audit()
        if entry["responseStatus"]["code"] in (401, 403)
        and "exceeded quota" not in entry["responseStatus"].get("message", "")
    ]
    assert forbidden == []
