"""What `helm test` runs in a pod: the API is served, the operator leads, a fleet answers.

Reads its task from the environment (NAMESPACE, LEASE, MODEL_URI, TIMEOUT_SECONDS), needs the
standard library only, and ends with status 1 and one line that says what is wrong.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
FLEETS = "/apis/tilefleet.io/v1alpha1/namespaces/{}/inferencedeployments"


def call(method: str, path: str, body: dict | None = None) -> tuple[int, dict]:
    """One request to the API server: status code and decoded answer."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    request = urllib.request.Request(
        f"https://{host}:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        method=method,
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
            "Content-Type": "application/json",
        },
    )
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def fail(message: str) -> None:
    """Ends the test with the one line that says what is wrong."""
    print(f"FAILED: {message}", flush=True)
    sys.exit(1)


def wait(what: str, check, seconds: float) -> None:
    """Calls check() each second until it returns None; it returns the reason while it is not so."""
    deadline = time.monotonic() + seconds
    while (reason := check()) is not None:
        if time.monotonic() > deadline:
            fail(f"{what} not so after {seconds:.0f} s: {reason}")
        time.sleep(1)
    print(f"ok: {what}", flush=True)


def lease_is_fresh() -> str | None:
    """Why no operator leads; None when one renewed its Lease in time."""
    namespace, lease = os.environ["NAMESPACE"], os.environ["LEASE"]
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{lease}"
    status, answer = call("GET", path)
    if status != 200:
        return str(answer.get("message", answer))
    spec = answer["spec"]
    if not spec.get("holderIdentity") or not spec.get("renewTime"):
        return f"the Lease {lease} has no holder"
    age = (datetime.now(UTC) - datetime.fromisoformat(spec["renewTime"])).total_seconds()
    if age > spec["leaseDurationSeconds"]:
        return f"{spec['holderIdentity']} renewed the Lease {lease} {age:.0f} s ago"
    return None


def fleet(name: str, uri: str, replicas: int) -> dict:
    """An InferenceDeployment of a fixed size on CPUs."""
    return {
        "apiVersion": "tilefleet.io/v1alpha1",
        "kind": "InferenceDeployment",
        "metadata": {"name": name, "labels": {"tilefleet.io/helm-test": "true"}},
        "spec": {
            "model": {"uri": uri},
            "accelerator": {"vendor": "cpu"},
            "replicas": replicas,
            "autoscaling": {"mode": "Manual"},
        },
    }


def refuses_bad_spec(namespace: str) -> None:
    """The CRD that is served is ours and checks: a dry run changes nothing."""
    status, answer = call(
        "POST", FLEETS.format(namespace) + "?dryRun=All", fleet("bad", "ftp://nowhere/x", 1)
    )
    if status != 422:
        fail(f"the API took model.uri ftp://nowhere/x (HTTP {status}): {answer.get('message')}")
    print("ok: a model.uri with an unknown scheme is refused", flush=True)


def complete(namespace: str, name: str) -> str | None:
    """Asks the fleet's Service for eight tokens; None when they came."""
    request = urllib.request.Request(
        f"http://{name}.{namespace}.svc:8000/v1/completions",
        data=json.dumps({"model": name, "prompt": "The", "max_tokens": 8}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            tokens = json.load(answer)["usage"]["completion_tokens"]
    except OSError as error:
        return f"{error}"
    return None if tokens > 0 else "the answer holds no token"


def serves(namespace: str, uri: str, seconds: float) -> None:
    """Creates a fleet, waits for it, asks it, deletes it whatever happened."""
    name = f"helm-test-{int(time.time()):x}"
    path = FLEETS.format(namespace)
    status, answer = call("POST", path, fleet(name, uri, 1))
    if status != 201:
        fail(f"could not create {name}: {answer.get('message')}")

    def ready() -> str | None:
        _, answer = call("GET", f"{path}/{name}")
        for condition in answer.get("status", {}).get("conditions", []):
            if condition["type"] == "Ready":
                text = f"{condition['reason']}: {condition.get('message', '')}"
                return None if condition["status"] == "True" else text
        return "it has no Ready condition: the operator has not seen it"

    try:
        wait(f"fleet {name} is ready", ready, seconds)
        wait(f"fleet {name} completes a prompt", lambda: complete(namespace, name), 30)
    finally:
        call("DELETE", f"{path}/{name}")


def main() -> None:
    """Runs the checks from the cheapest to the dearest."""
    namespace, uri = os.environ["FLEET_NAMESPACE"], os.environ["MODEL_URI"]
    status, answer = call("GET", FLEETS.format(namespace))
    if status != 200:
        fail(f"the API does not serve InferenceDeployments: {answer.get('message')}")
    print("ok: the API serves InferenceDeployments", flush=True)
    refuses_bad_spec(namespace)
    wait("an operator holds its Lease", lease_is_fresh, 60)
    if uri:
        serves(namespace, uri, float(os.environ["TIMEOUT_SECONDS"]))


if __name__ == "__main__":
    main()
