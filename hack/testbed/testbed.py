"""A cluster to try tilefleet on: the local one, or the user's; kubectl, helm and the chart on it.

The demo, the end-to-end tests and the operator's benchmark share it. It does not know what they
look for.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "tilefleet"
NAMESPACE = "tilefleet-system"
OPERATOR = f"{RELEASE}-operator"
FAKE_NODES = "kwok.x-k8s.io/node=fake"

Json = dict[str, Any]
Found = TypeVar("Found")


class TestbedError(Exception):
    """A command or a wait failed; the message says which, why, and what to look at."""

    __test__ = False  # not a test class, whatever its name begins with


def until(
    what: str, look: Callable[[], tuple[Found | None, str]], seconds: float, every: float = 0.25
) -> Found:
    """What `look` found, as soon as that is not None; it returns (found, why not yet).

    Raises TestbedError with the last reason after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        found, why = look()
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise TestbedError(f"{what}: not within {seconds:.0f} s; last seen: {why}")
        time.sleep(every)


@dataclass(frozen=True)
class Testbed:
    """Access to one cluster.

    environment: for every command, with KUBECONFIG and PATH. enter: argument prefix that puts
    kubectl and helm where the API server is reachable. enter_names: the same for a program that
    also resolves names of Services. Both are empty on a cluster of the user's. audit_log: JSON
    lines of the API server, None where they are not ours to read. chart_values: helm arguments
    that name the images.
    """

    __test__ = False

    environment: dict[str, str]
    enter: tuple[str, ...] = ()
    enter_names: tuple[str, ...] = ()
    audit_log: Path | None = None
    chart_values: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether the cluster is the one this repository starts."""
        return bool(self.enter)

    def run(
        self, *command: str, stdin: str | None = None, check: bool = True, seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """One command where the cluster is reachable. Raises TestbedError with its last words."""
        try:
            done = subprocess.run(
                [*self.enter, *command],
                input=stdin,
                text=True,
                capture_output=True,
                env=self.environment,
                timeout=seconds,
                cwd=ROOT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TestbedError(f"{' '.join(command)}: no end within {seconds:.0f} s") from error
        if check and done.returncode != 0:
            raise TestbedError(
                f"{' '.join(command)}: exit status {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-2000:]}"
            )
        return done

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """A command that goes on; the caller ends it."""
        return subprocess.Popen(
            [*self.enter_names, *command], text=True, env=self.environment, cwd=ROOT, **options
        )

    @contextlib.contextmanager
    def endpoint(self, service: str, namespace: str = "default") -> Iterator[str]:
        """Base URL of a Service's port 8000 for programs that `start` starts.

        Its DNS name on the local cluster; on another one a forwarded port, which reaches one pod.
        """
        if self.is_local:
            yield f"http://{service}.{namespace}.svc.cluster.local:8000"
            return
        command = ("kubectl", "-n", namespace, "port-forward", f"service/{service}", ":8000")
        # Its complaints about connections that clients closed would fill the terminal.
        forward = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            assert forward.stdout is not None
            line = forward.stdout.readline()  # Forwarding from 127.0.0.1:43210 -> 8000
            if "127.0.0.1:" not in line:
                raise TestbedError(f"{' '.join(command)}: {line or 'it ended'}")
            yield f"http://127.0.0.1:{line.split('127.0.0.1:')[1].split()[0]}"
        finally:
            forward.terminate()
            forward.wait()

    def add_fake_nodes(self, count: int) -> list[str]:
        """Node objects with AMD's labels and 8 amd.com/gpu each, on the local cluster only."""
        self.run("python3", "hack/cluster", "add-fake-nodes", str(count), seconds=120)
        listed = self.kubectl("get", "nodes", "-l", FAKE_NODES, "-o", "name").split()
        return [name.removeprefix("node/") for name in listed]

    def remove_fake_nodes(self) -> None:
        """Undo add_fake_nodes, with the pods on those nodes."""
        self.run("python3", "hack/cluster", "remove-fake-nodes", seconds=120)

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = 60) -> str:
        """Standard output of kubectl. Raises TestbedError."""
        return self.run("kubectl", *arguments, stdin=stdin, seconds=seconds).stdout

    def get(self, kind: str, name: str, namespace: str = "default") -> Json | None:
        """One object, None when it does not exist."""
        done = self.run("kubectl", "-n", namespace, "get", kind, name, "-o", "json", check=False)
        if done.returncode != 0:
            if "NotFound" in done.stderr:
                return None
            raise TestbedError(f"kubectl get {kind} {name}: {done.stderr.strip()}")
        found: Json = json.loads(done.stdout)
        return found

    def find(self, kind: str, namespace: str = "default", selector: str = "") -> list[Json]:
        """Objects of one kind, by name."""
        arguments = ["-n", namespace, "get", kind, "-o", "json"]
        arguments += ["-l", selector] if selector else []
        items: list[Json] = json.loads(self.kubectl(*arguments))["items"]
        return sorted(items, key=lambda item: item["metadata"]["name"])

    def apply(self, obj: Json) -> None:
        """kubectl apply of one object."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps(obj))

    def pods(self, fleet: str, namespace: str = "default") -> list[Json]:
        """Pods of one fleet that are not being deleted."""
        selector = f"tilefleet.io/deployment={fleet}"
        return [p for p in self.find("pods", namespace, selector) if not is_leaving(p)]

    def wait_ready(self, fleet: str, namespace: str = "default", seconds: float = 180) -> Json:
        """The fleet once its Ready condition is True for the present generation."""

        def look() -> tuple[Json | None, str]:
            found = self.get("infd", fleet, namespace)
            if found is None:
                return None, "it does not exist"
            ready = condition(found, "Ready")
            current = ready.get("observedGeneration") == found["metadata"]["generation"]
            why = f"{ready.get('reason')}: {ready.get('message')}"
            return (found if ready.get("status") == "True" and current else None), why

        return until(f"fleet {fleet} Ready", look, seconds)

    def install(self, *more: str, seconds: float = 180) -> None:
        """Install or upgrade the chart, and wait until the operator is ready."""
        self.run(
            *("helm", "upgrade", "--install", RELEASE, "helm/tilefleet"),
            *("--namespace", NAMESPACE, "--create-namespace", "--wait", "--timeout", "150s"),
            *self.chart_values,
            *more,
            seconds=seconds,
        )

    def leader(self) -> str | None:
        """Identity that holds the operator's Lease."""
        lease = self.get("lease", OPERATOR, NAMESPACE)
        return lease["spec"].get("holderIdentity") if lease else None

    def audit_events(self, since: int = 0) -> list[Json]:
        """Requests about resources in the API server's audit log, from a byte offset on."""
        if self.audit_log is None:
            raise TestbedError("this cluster's audit log is not ours to read")
        with self.audit_log.open("rb") as log:
            log.seek(since)
            lines = log.read().splitlines(keepends=True)
        events = (json.loads(line) for line in lines if line.endswith(b"\n"))
        return [event for event in events if "objectRef" in event]

    def audit_position(self) -> int:
        """Byte offset of the present end of the audit log."""
        return self.audit_log.stat().st_size if self.audit_log else 0

    def diagnosis(self, namespace: str = "default") -> str:
        """What a person would look at first when something is stuck."""
        looks: Sequence[tuple[str, ...]] = (
            ("get", "infd,pods,services", "-A", "-o", "wide"),
            ("-n", namespace, "get", "events", "--sort-by=.lastTimestamp"),
            ("-n", namespace, "get", "infd", "-o", "jsonpath={.items[*].status}"),
            ("-n", NAMESPACE, "logs", f"deployment/{OPERATOR}", "--all-pods", "--tail=40"),
            ("-n", namespace, "logs", "-l", "tilefleet.io/deployment", "--tail=30", "--prefix"),
        )
        texts = []
        for arguments in looks:
            done = self.run("kubectl", *arguments, check=False)
            texts.append(f"$ kubectl {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        return "\n".join(texts)


def condition(obj: Json, kind: str) -> Json:
    """One condition of an object's status; empty when it is not there yet."""
    conditions = (obj.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), {})


def is_leaving(pod: Json) -> bool:
    """Whether a pod is being deleted."""
    return "deletionTimestamp" in pod["metadata"]


def is_ready(pod: Json) -> bool:
    """Whether a pod is Ready and stays."""
    return condition(pod, "Ready").get("status") == "True" and not is_leaving(pod)
