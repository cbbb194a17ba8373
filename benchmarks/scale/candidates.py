"""The operators that benchmarks/operator_scale.py measures: how each is started, and what it takes.

Ours as two replicas of which one leads, with the rights that the chart grants; the plain kopf
operator as one process with all rights.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.operator.apiserver import ApiServer, free_port, grant

HOME = "tilefleet-system"
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
PEER = Path(__file__).parents[1] / "peers" / "kopf_operator.py"

Json = dict[str, Any]


@dataclass
class Candidate:
    """One kind of operator: how to start its processes."""

    name: str
    user: str
    argv: list[str]
    replicas: int
    environment: dict[str, str] = field(default_factory=dict)
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    identities: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    log: Path = Path(os.devnull)
    ended: int = 0

    def supervise(self) -> None:
        """Start again what ended by itself, as a kubelet would, and count it."""
        self.ended += sum(one.poll() is not None for one in self.processes)
        self.start()

    def start(self) -> None:
        """Start what is missing of its processes, as a Deployment would."""
        self.processes = [one for one in self.processes if one.poll() is None]
        while len(self.processes) < self.replicas:
            argv = [part.replace("PORT", str(free_port())) for part in self.argv]
            identity = f"replica-{time.monotonic_ns()}"
            if self.name == "tilefleet":
                argv += [f"--probe-port={free_port()}", f"--metrics-port={free_port()}"]
                argv += [f"--identity={identity}"]
            with self.log.open("ab") as output:
                process = subprocess.Popen(
                    argv, stdout=output, stderr=output, env={**os.environ, **self.environment}
                )
            self.processes.append(process)
            self.identities[identity] = process

    def leader(self, holder: str) -> "subprocess.Popen[bytes]":
        """The process that holds the Lease; the only one where there is none."""
        named = [one for name, one in self.identities.items() if holder.startswith(name)]
        (found,) = named or self.processes
        return found

    def stop(self) -> None:
        """End them all."""
        for process in self.processes:
            process.kill()
            process.wait()

    def cpu_seconds(self) -> float:
        """CPU time of the processes alive, all replicas together."""
        return sum(_cpu(one.pid) for one in self.processes)

    def rss_mib(self) -> float:
        """Resident memory of the largest."""
        return max(_rss(one.pid) for one in self.processes) / 2**20


def cluster_cpu_seconds() -> float:
    """CPU time of this process and of all that it started and that is alive."""
    children = (one.read_text().split() for one in Path("/proc/self/task").glob("*/children"))
    return _cpu(os.getpid()) + sum(_cpu(int(pid)) for found in children for pid in found)


def _cpu(pid: int) -> float:
    with suppress(FileNotFoundError):
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / TICKS
    return 0.0


def _rss(pid: int) -> int:
    with suppress(FileNotFoundError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return 0


def candidates(api: ApiServer) -> list[Candidate]:
    """Ours, two replicas of which one leads, and the plain kopf operator."""
    ours = [
        sys.executable, "-m", "tilefleet_operator", "run", f"--namespace={HOME}",
        f"--kubeconfig={api.kubeconfig('operator-a')}", "--log-format=text",
        "--worker-cpu-image=worker:1", "--worker-image=worker:1",
    ]  # fmt: skip
    peer = [sys.executable, str(PEER)]
    return [
        Candidate("tilefleet", "operator-a", ours, 2, log=api.folder / "ours.log"),
        Candidate(
            "plain kopf operator", "operator-b", peer, 1,
            {"KUBECONFIG": api.kubeconfig("operator-b")}, log=api.folder / "peer.log",
        ),
    ]  # fmt: skip


def allow(api: ApiServer) -> None:
    """The chart's rights for ours; all rights for the peer, which has no chart."""
    grant(api, HOME, everywhere=True)
    group = "rbac.authorization.k8s.io"
    binding: Json = {
        "metadata": {"name": "peer"},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": "operator-b"}],
    }
    api.create(f"/apis/{group}/v1/clusterrolebindings", binding)
