"""Whether each part of a running cluster answers; runs inside its network namespace."""

import http.client
import json
import ssl
from collections.abc import Callable
from pathlib import Path

from kit.settings import NODE_ADDRESS, NODE_NAME, REGISTRY


def problems(run: Path) -> list[str]:
    """One line per part that is not ready; [] for a healthy cluster."""
    checks: dict[str, Callable[[], bool]] = {
        "API server": lambda: _api(run, "/readyz")[0] == 200,
        f"node {NODE_NAME}": lambda: _node_ready(run),
        "default service account": lambda: _has_account(run),
        "cluster DNS": lambda: _plain("127.0.0.1:8182", "/ready") == 200,
        "kube-proxy": lambda: _plain("127.0.0.1:10256", "/healthz") == 200,
        "image registry": lambda: _plain(REGISTRY, "/v2/") == 200,
    }
    found = []
    for name, check in checks.items():
        try:
            if not check():
                found.append(f"{name} is not ready")
        except (OSError, ValueError, http.client.HTTPException) as error:
            found.append(f"{name} does not answer: {error}")
    return found


def api_ready(run: Path) -> bool:
    """Whether the API server says it is ready."""
    try:
        return _api(run, "/readyz")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _node_ready(run: Path) -> bool:
    status, body = _api(run, f"/api/v1/nodes/{NODE_NAME}")
    conditions = json.loads(body).get("status", {}).get("conditions", []) if status == 200 else []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _has_account(run: Path) -> bool:
    return _api(run, "/api/v1/namespaces/default/serviceaccounts/default")[0] == 200


def _api(run: Path, path: str) -> tuple[int, bytes]:
    config = json.loads((run / "admin.kubeconfig").read_text())
    token = config["users"][0]["user"]["token"]
    trust = ssl.create_default_context(cafile=str(run / "pki" / "ca.crt"))
    # http.client, unlike urllib, never asks a proxy.
    connection = http.client.HTTPSConnection(NODE_ADDRESS, 6443, timeout=3, context=trust)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _plain(address: str, path: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=3)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()
