"""A real kube-apiserver with etcd for tests, with RBAC as the chart grants it and an audit log."""

import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import helm_python as helm
import yaml

ROOT = Path(__file__).parents[2]
LABEL = "tilefleet.io/deployment"
FLEETS = "/apis/tilefleet.io/v1alpha1"
GROUPS = {
    "inferencedeployments": FLEETS,
    "poddisruptionbudgets": "/apis/policy/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "podmonitors": "/apis/monitoring.coreos.com/v1",
    "controllerrevisions": "/apis/apps/v1",
}
OPERATORS = ("operator-a", "operator-b")
MUTATING = frozenset({"create", "update", "patch", "delete", "deletecollection"})

Json = dict[str, Any]

AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "users": list(OPERATORS)}, {"level": "None"}],
}


def free_port() -> int:
    """A TCP port of the loopback that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


Value = TypeVar("Value")


def until(
    what: str, check: Callable[[], Value | None], seconds: float = 30, every: float = 0.05
) -> Value:
    """The first true value of ``check``; fails with the last value seen."""
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s; last: {value!r}")
        time.sleep(every)


class Refused(Exception):
    """An answer of the API server that is no success."""

    def __init__(self, code: int, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"{code}: {message}")


class ApiServer:
    """One API server: requests as its administrator, kubeconfigs, and the audit log."""

    def __init__(self, folder: Path, port: int, tokens: Mapping[str, str]) -> None:
        self.folder, self.tokens = folder, tokens
        self.url = f"https://127.0.0.1:{port}"
        self.authority = folder / "apiserver.crt"
        self.audit_log = folder / "audit.log"
        self.restart: Callable[[], None] = lambda: None
        """kill -9 the server, keep etcd, and wait until it is ready again."""

    def request(
        self, method: str, path: str, body: Json | None = None, kind: str = "application/json"
    ) -> Json:
        """One request. Raises Refused."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.tokens['admin']}", "Content-Type": kind},
        )
        context = ssl.create_default_context(cafile=self.authority)
        try:
            with urllib.request.urlopen(request, context=context, timeout=20) as answer:
                result: Json = json.load(answer)
                return result
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            with suppress(ValueError, KeyError):
                text = json.loads(text)["message"]
            raise Refused(error.code, text) from None

    def get(self, path: str) -> Json:
        """GET."""
        return self.request("GET", path)

    def merge(self, path: str, patch: Json) -> Json:
        """Merge-patch."""
        return self.request("PATCH", path, patch, "application/merge-patch+json")

    def create(self, path: str, body: Json) -> Json:
        """POST."""
        return self.request("POST", path, body)

    def delete(self, path: str, grace_seconds: int | None = None) -> Json:
        """DELETE."""
        options: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return self.request("DELETE", path, options)

    def kubeconfig(self, user: str) -> str:
        """File of a kubeconfig for one of the users."""
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [
                {
                    "name": "c",
                    "cluster": {"server": self.url, "certificate-authority": str(self.authority)},
                }
            ],
            "users": [{"name": "u", "user": {"token": self.tokens[user]}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        file = self.folder / f"{user}.kubeconfig"
        file.write_text(yaml.safe_dump(document))
        return str(file)

    def audit(self, position: int = 0) -> list[Json]:
        """Finished requests of the operators since a position of the log."""
        with self.audit_log.open() as log:
            log.seek(position)
            lines = log.read().splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [entry for entry in whole if entry["stage"] == "ResponseComplete"]

    def audit_position(self) -> int:
        """Where the log ends now."""
        return self.audit_log.stat().st_size if self.audit_log.exists() else 0

    def writes(self, position: int = 0, user: str | None = None) -> list[str]:
        """Mutating requests of the operators but for Leases: ``verb resource/name code``."""
        found = []
        for entry in self.audit(position):
            reference = entry.get("objectRef") or {}
            if entry["verb"] not in MUTATING or reference.get("resource") == "leases":
                continue
            if user is None or entry["user"]["username"] == user:
                parts = (reference.get(part) for part in ("resource", "subresource", "name"))
                where = "/".join(filter(None, parts))
                found.append(f"{entry['verb']} {where} {entry['responseStatus']['code']}")
        return found


def binaries() -> dict[str, str]:
    """Paths of etcd and kube-apiserver: in $KUBEBUILDER_ASSETS, as envtest has it, or from the
    cluster kit, which builds what is missing."""
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nonexistent"))
    if all((assets / name).exists() for name in ("etcd", "kube-apiserver")):
        return {name: str(assets / name) for name in ("etcd", "kube-apiserver")}
    kit = [sys.executable, str(ROOT / "hack" / "cluster"), "binaries"]
    result = subprocess.run(kit, stdout=subprocess.PIPE, text=True, check=True)
    return dict(line.split("\t", 1) for line in result.stdout.splitlines() if "\t" in line)


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that dies with the block, and with this process."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def running(folder: Path) -> Iterator[ApiServer]:
    """Start etcd and kube-apiserver on free ports of the loopback, with the CRD installed."""
    programs = binaries()
    client, peer, secure = free_port(), free_port(), free_port()
    etcd_url = f"http://127.0.0.1:{client}"
    tokens = {user: secrets.token_hex(16) for user in ("admin", *OPERATORS)}
    groups = {"admin": '"system:masters"'}
    (folder / "tokens.csv").write_text(
        "".join(f"{t},{user},{user},{groups.get(user, '')}\n" for user, t in tokens.items())
    )
    (folder / "audit.yaml").write_text(json.dumps(AUDIT_POLICY))
    key = folder / "sa.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    etcd = [
        programs["etcd"],
        f"--data-dir={folder}/etcd",
        f"--listen-client-urls={etcd_url}",
        f"--advertise-client-urls={etcd_url}",
        f"--listen-peer-urls=http://127.0.0.1:{peer}",
        "--unsafe-no-fsync",
    ]
    server = [
        programs["kube-apiserver"],
        f"--etcd-servers={etcd_url}",
        "--bind-address=127.0.0.1",
        f"--secure-port={secure}",
        f"--cert-dir={folder}",
        f"--token-auth-file={folder}/tokens.csv",
        "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.0.0.0/16",
        "--service-account-issuer=https://localhost",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        # No controller makes default service accounts here.
        "--disable-admission-plugins=ServiceAccount",
        f"--audit-policy-file={folder}/audit.yaml",
        f"--audit-log-path={folder}/audit.log",
        "--audit-log-maxsize=1000",
    ]
    api = ApiServer(folder, secure, tokens)
    with started(etcd, folder / "etcd.log"), ExitStack() as stack:

        def start() -> None:
            process = stack.enter_context(started(server, folder / "apiserver.log"))
            until("the API server is ready", lambda: _is_ready(api, process), 120, 0.2)

        def restart() -> None:
            stack.close()
            start()

        api.restart = restart
        start()
        _install_crd(api)
        yield api


def _is_ready(api: ApiServer, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        log = (api.folder / "apiserver.log").read_text()[-3000:]
        raise AssertionError(f"kube-apiserver ended with {process.returncode}: {log}")
    try:
        api.get("/api/v1/namespaces/default")
    except (Refused, OSError):
        return False
    return True


def _install_crd(api: ApiServer) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for file in sorted((ROOT / "crds").glob("*.yaml")):
        crd = yaml.safe_load(file.read_text())
        api.create(path, crd)
        name = crd["metadata"]["name"]

        def established(name: str = name) -> bool:
            conditions = api.get(f"{path}/{name}").get("status", {}).get("conditions") or []
            return any(
                c["type"] == "Established" and c["status"] == "True" for c in conditions or []
            )

        until(f"CRD {name} is established", established)
    until("the API is served", lambda: _serves(api))


def _serves(api: ApiServer) -> bool:
    try:
        api.get(f"{FLEETS}/inferencedeployments")
    except Refused:
        return False
    return True


def grant(api: ApiServer, namespace: str, everywhere: bool = False) -> None:
    """The rights that the chart gives an operator, for our two users.

    In its own namespace; everywhere: in all namespaces.
    """
    with helm.Chart.load(str(ROOT / "helm" / "tilefleet")) as chart:
        values = {"watchNamespaces": [] if everywhere else [namespace]}
        texts = chart.render(values, name="tilefleet", namespace=namespace)
    subjects = [
        {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": user}
        for user in OPERATORS
    ]
    base = "/apis/rbac.authorization.k8s.io/v1"
    for path, text in texts.items():
        for found in yaml.safe_load_all(text) if path.endswith("rbac.yaml") else ():
            if found is None:
                continue
            if "subjects" in found:
                found["subjects"] = subjects
            plural = found["kind"].lower() + "s"
            scope = "" if found["kind"].startswith("Cluster") else f"/namespaces/{namespace}"
            api.create(f"{base}{scope}/{plural}", found)


class Namespace:
    """One namespace of the API server, in which one test lives."""

    def __init__(self, api: ApiServer, name: str) -> None:
        self.api, self.name = api, name
        api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        grant(api, name)

    def path(self, plural: str, name: str = "") -> str:
        """API path of a resource or an object."""
        base = GROUPS.get(plural, "/api/v1")
        return f"{base}/namespaces/{self.name}/{plural}" + (f"/{name}" if name else "")

    def fleet(self, name: str, **spec: Any) -> Json:
        """Create an InferenceDeployment on CPU, sized by spec.replicas unless told otherwise."""
        return self.api.create(self.path("inferencedeployments"), fleet(name, **spec))

    def pods(self, fleet: str) -> list[Json]:
        """Pods of a fleet that are not about to go."""
        items = self.api.get(self.path("pods") + f"?labelSelector={LABEL}%3D{fleet}")["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def conditions(self, fleet: str) -> dict[str, Json]:
        """Condition type → condition."""
        found = self.api.get(self.path("inferencedeployments", fleet))
        return {c["type"]: c for c in found.get("status", {}).get("conditions", [])}

    def status(self, fleet: str) -> Json:
        """The status, {} before the first."""
        found = self.api.get(self.path("inferencedeployments", fleet))
        status: Json = found.get("status") or {}
        return status

    def events(self, fleet: str) -> list[tuple[str, str]]:
        """(reason, message) of the Events of a fleet."""
        items = self.api.get(self.path("events"))["items"]
        mine = [event for event in items if event["involvedObject"]["name"] == fleet]
        return sorted((event["reason"], event["message"]) for event in mine)

    def holder(self) -> str:
        """Who holds the operator's Lease; "" for nobody."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.name}/leases/tilefleet-operator"
        try:
            return str(self.api.get(path)["spec"].get("holderIdentity") or "")
        except Refused:
            return ""


def fleet(name: str, **spec: Any) -> Json:
    """An InferenceDeployment on CPU, sized by spec.replicas unless told otherwise."""
    base: Json = {
        "model": {"uri": "file:///models/tiny"},
        "engine": {"image": "worker:1"},
        "accelerator": {"vendor": "cpu"},
        "autoscaling": {"mode": "Manual"},
    }
    return {
        "apiVersion": "tilefleet.io/v1alpha1",
        "kind": "InferenceDeployment",
        "metadata": {"name": name},
        "spec": base | spec,
    }
