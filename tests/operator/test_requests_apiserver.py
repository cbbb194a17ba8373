"""What a fleet costs the API server, by its own audit log: a new one, a change, one replica more.

At 1,000 fleets each request more is a thousand; these numbers rise only on purpose.
"""

import pytest

from tests.operator.apiserver import ApiServer, Namespace, until
from tests.operator.processes import FakeKubelet, OperatorProcess

pytestmark = pytest.mark.apiserver
STATUS = "patch inferencedeployments/status"
STATUSES = 4
"""At most: the answer to the spec, replicas that exist, run, are ready; less when they hurry."""


class Requests:
    """Requests about one namespace since the last look, but for Leases, lists and watches."""

    def __init__(self, api: ApiServer, namespace: str) -> None:
        self.api, self.namespace = api, namespace
        self.position = api.audit_position()

    def made(self) -> list[str]:
        entries = self.api.audit(self.position)
        found = []
        for entry in entries:
            reference = entry.get("objectRef") or {}
            ours = reference.get("namespace") == self.namespace
            if not ours or entry["verb"] in ("list", "watch") or reference["resource"] == "leases":
                continue
            what = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
            found.append(f"{entry['verb']} {what}")
        return sorted(found)

    def statuses(self) -> int:
        return self.made().count(STATUS)

    def rest(self) -> list[str]:
        return [one for one in self.made() if one != STATUS]


def settled(namespace: Namespace, replicas: int) -> bool:
    """Every replica serves, the status says so, and it is the last word."""
    status = namespace.status("fleet")
    found = namespace.api.get(namespace.path("inferencedeployments", "fleet"))
    generation = found["metadata"]["generation"]
    return (
        status.get("observedGeneration") == generation
        and status.get("readyReplicas") == status.get("updatedReplicas") == replicas
        and all(c["observedGeneration"] == generation for c in status["conditions"])
    )


def test_requests_of_a_fleet(
    apiserver: ApiServer, namespace: Namespace, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    operator.wait_leads()
    new = Requests(apiserver, namespace.name)
    namespace.fleet("fleet")
    until("it serves", lambda: settled(namespace, 1))
    assert new.rest() == [
        "patch controllerrevisions",
        "patch networkpolicies",
        "patch poddisruptionbudgets",
        "patch pods",
        "patch serviceaccounts",
        "patch services",
    ]
    assert 2 <= new.statuses() <= STATUSES

    changed = Requests(apiserver, namespace.name)
    path = namespace.path("inferencedeployments", "fleet")
    namespace.api.merge(path, {"spec": {"rollout": {"maxSurge": 3}}})
    until("it is observed", lambda: settled(namespace, 1))
    assert (changed.rest(), changed.statuses()) == ([], 1)

    grown = Requests(apiserver, namespace.name)
    namespace.api.merge(path, {"spec": {"replicas": 2}})
    until("both serve", lambda: settled(namespace, 2))
    assert grown.rest() == ["create events", "patch poddisruptionbudgets", "patch pods"]
    assert 2 <= grown.statuses() <= STATUSES
