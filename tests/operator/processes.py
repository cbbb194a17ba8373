"""What runs around the API server in tests: the operator as a real process, and fakes of the rest.

Fake, and named so: FakeKubelet, which binds pods to a node and reports them ready, and FakeWorker,
the admin port of one pod.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.operator.apiserver import Json, Namespace, Refused, free_port, until


class OperatorProcess:
    """``python -m tilefleet_operator run`` as a process."""

    def __init__(self, namespace: Namespace, user: str) -> None:
        self.namespace, self.user = namespace, user
        self.probe_port, self.metrics_port = free_port(), free_port()
        api = namespace.api
        self.log = api.folder / f"{namespace.name}-{user}-{self.probe_port}.log"
        command = [
            sys.executable, "-m", "tilefleet_operator", "run",
            f"--kubeconfig={api.kubeconfig(user)}", f"--namespace={namespace.name}",
            f"--identity={user}", f"--watch-namespaces={namespace.name}",
            f"--probe-port={self.probe_port}", f"--metrics-port={self.metrics_port}",
            "--log-format=text", "--worker-cpu-image=worker:1", "--worker-image=worker:1",
        ]  # fmt: skip
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def leads(self) -> bool:
        """Whether this process holds the Lease."""
        if self.process.poll() is not None:
            text = self.log.read_text()[-4000:]
            raise AssertionError(f"{self.user} ended with {self.process.returncode}:\n{text}")
        return self.namespace.holder().startswith(self.user)

    def wait_leads(self) -> None:
        """Until it leads."""
        until(f"{self.user} leads", self.leads, 60)

    def http(self, port: int, path: str) -> tuple[int, str]:
        """Status and body of one of its own ports; (0, ...) when nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def metric(self, name: str) -> float:
        """Value of a metric, labels included in the name; 0 when absent."""
        _, text = self.http(self.metrics_port, "/metrics")
        for line in text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def stop(self) -> None:
        """kill -9, whatever its state."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class FakeWorker:
    """The admin port of one pod: /stats and /drain on the pod's own loopback address."""

    def __init__(self, ip: str) -> None:
        self.drained = threading.Event()
        self.counters = {"arrivals": 0, "generated_tokens": 0, "prompt_tokens_computed": 0,
                         "steps": 0, "busy_seconds": 0.0, "completions": 0}  # fmt: skip
        self.gauges = {"running": 0, "waiting": 0, "max_concurrent": 256}
        self.started = time.monotonic()
        worker = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, worker.document())

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                worker.drained.set()
                self.answer(202, {"draining": True, "inflight": worker.gauges["running"]})

            def answer(self, status: int, body: Json) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer((ip, 8001), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def document(self) -> Json:
        """/stats as the worker's contract says."""
        return {
            "version": 1, "model": "tiny", "revision": "r",
            "uptime_seconds": time.monotonic() - self.started,
            "draining": self.drained.is_set(), "ready": not self.drained.is_set(),
            "block_size": 16, "counters": dict(self.counters), "gauges": dict(self.gauges),
            "steps": [], "startup": [], "device": {"kind": "cpu"},
        }  # fmt: skip

    def close(self) -> None:
        """Free the address."""
        self.server.shutdown()
        self.server.server_close()


class FakeKubelet:
    """Binds every pod to a node that does not exist, reports it ready, removes it when told to.

    A pod whose worker drains is reported unready, as its readiness probe would.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.workers: dict[str, FakeWorker] = {}
        self.drained_before_delete: list[bool] = []
        self.hold_ready = False
        self._number = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End, and raise what went wrong inside."""
        self._stop.set()
        self._thread.join()
        for worker in self.workers.values():
            worker.close()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.05):
                for pod in self.namespace.api.get(self.namespace.path("pods"))["items"]:
                    self._tend(pod)
        except BaseException as error:
            self._error = error

    def _tend(self, pod: Json) -> None:
        api, metadata = self.namespace.api, pod["metadata"]
        where, uid = self.namespace.path("pods", metadata["name"]), metadata["uid"]
        try:
            if "deletionTimestamp" in metadata:
                if uid in self.workers:
                    worker = self.workers.pop(uid)
                    self.drained_before_delete.append(worker.drained.is_set())
                    worker.close()
                api.delete(where, grace_seconds=0)
            elif not pod["spec"].get("nodeName"):
                binding = {"metadata": {"name": metadata["name"]}, "target": {"name": "fake-node"}}
                api.create(f"{where}/binding", binding)
            elif uid not in self.workers and not self.hold_ready:
                self._number += 1
                ip = f"127.{40 + os.getpid() % 80}.{self._number // 250}.{self._number % 250 + 1}"
                self.workers[uid] = FakeWorker(ip)
                self._report(where, True, ip)
            elif _ready(pod) and uid in self.workers and self.workers[uid].drained.is_set():
                self._report(where, False, pod["status"]["podIP"])
        except Refused as refused:
            if refused.code not in (404, 409):
                raise

    def _report(self, where: str, ready: bool, ip: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        status = "True" if ready else "False"
        conditions = [
            {"type": kind, "status": status if kind.endswith("Ready") else "True",
             "lastTransitionTime": now}
            for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]  # fmt: skip
        body = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}
        self.namespace.api.merge(f"{where}/status", {"status": body})


def _ready(pod: Json) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def ready_count(pods: list[Json]) -> int:
    """How many of the pods are Ready."""
    return sum(map(_ready, pods))
