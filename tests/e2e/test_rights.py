"""Runs last: the rights that the chart grants are the rights that all tests made the operator use.

Missing ones show as refused requests, whatever ran. That none is spare, only a run of every
end-to-end test can show; after any other run that test is skipped and says so.
"""

from pathlib import Path

import pytest
import yaml
from testbed import NAMESPACE, OPERATOR, RELEASE, Json, Testbed

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{OPERATOR}"
UNSEEN = {
    # No request of its own: the admission plugin OwnerReferencesPermissionEnforcement asks for it
    # when a child names its owner with blockOwnerDeletion, as on OpenShift.
    ("update", "inferencedeployments/finalizers"),
    # Only after a fault: a name that is taken though no watch has shown by whom (a create whose
    # answer was lost, or somebody else's object) is looked at, and the owner before pods are made
    # when its status was not written first. tests/faults and test_executor make these requests.
    ("get", "inferencedeployments"),
    ("get", "services"),
    ("get", "serviceaccounts"),
    ("get", "poddisruptionbudgets"),
    ("get", "networkpolicies"),
    ("get", "controllerrevisions"),
    ("get", "podmonitors"),
}
Rights = set[tuple[str, str]]


def requests(session_audit: list[Json]) -> list[Json]:
    return [event for event in session_audit if event["user"]["username"] == ACCOUNT]


def test_no_request_was_forbidden(session_audit: list[Json]) -> None:
    mine = requests(session_audit)
    assert mine, "the audit log shows no request of the operator: the test sees nothing"
    forbidden = {
        (event["verb"], event["requestURI"], event["responseStatus"].get("message", ""))
        for event in mine
        if event["responseStatus"].get("code") == 403
        and not event["responseStatus"].get("message", "").count("exceeded quota")
        and not uninstalled(session_audit, event["requestReceivedTimestamp"])
    }
    assert forbidden == set()


def uninstalled(session_audit: list[Json], moment: str) -> bool:
    """Whether the chart's rights were gone then: its uninstall takes them before the operator."""
    last = [
        event["verb"]
        for event in session_audit
        if event["objectRef"].get("apiGroup") == "rbac.authorization.k8s.io"
        and event["objectRef"].get("name", "").startswith(OPERATOR)
        and event["verb"] in ("create", "delete")
        and event["requestReceivedTimestamp"] <= moment
    ][-1:]
    return last == ["delete"]


def test_no_granted_verb_is_spare(
    testbed: Testbed, session_audit: list[Json], request: pytest.FixtureRequest
) -> None:
    rights, used = granted(testbed), verbs(requests(session_audit))
    assert used <= rights, "a verb was used that the chart does not grant"
    spare = rights - used - UNSEEN
    left_out = partial(request)
    if spare and left_out:
        pytest.skip(f"not proven, {left_out}; not used by what ran: {sorted(spare)}")
    assert spare == set()


def verbs(mine: list[Json]) -> Rights:
    """(verb, resource) of requests that the API server allowed."""
    allowed = [event for event in mine if event["responseStatus"].get("code") != 403]
    used = {(event["verb"], resource(event)) for event in allowed}
    # A server-side apply that creates is authorised as patch and as create.
    created = [event for event in allowed if event["responseStatus"].get("code") == 201]
    return used | {("create", resource(event)) for event in created}


def resource(event: Json) -> str:
    reference = event["objectRef"]
    sub = reference.get("subresource")
    return f"{reference['resource']}/{sub}" if sub else str(reference["resource"])


def granted(testbed: Testbed) -> Rights:
    """(verb, resource) of every rule in the operator's roles of the release."""
    manifest = testbed.run("helm", "get", "manifest", RELEASE, "-n", NAMESPACE).stdout
    roles = [o for o in yaml.safe_load_all(manifest) if o and o["kind"] in ("Role", "ClusterRole")]
    return {
        (verb, name)
        for role in roles
        for rule in role["rules"]
        for name in rule["resources"]
        for verb in rule["verbs"]
    }


def partial(request: pytest.FixtureRequest) -> str:
    """What of the end-to-end tests this session left out; empty when all of them ran and passed."""
    folder = Path(__file__).parent
    config, session = request.config, request.session
    files = {item.path for item in session.items}
    missing = sorted(path.name for path in folder.glob("test_*.py") if path not in files)
    if missing:
        return f"without {', '.join(missing)}"
    if config.getoption("keyword") or any("::" in argument for argument in config.args):
        return "tests were chosen by name"
    return f"{session.testsfailed} tests failed" if session.testsfailed else ""
