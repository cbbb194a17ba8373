"""The operator at 1,000 fleets, beside a plain kopf operator, on one real API server.

    make bench-operator        or, from the root: .venv/bin/python benchmarks/operator_scale.py

Starts everything it needs in a folder of its own, says on standard error what it does, and ends it
all, within twelve minutes on a quiet machine of two cores.

Real: etcd, kube-apiserver with audit log, kube-scheduler, the garbage collector, kwok, which keeps
MI300X nodes and their pods alive. Cases, each for ours and then for benchmarks/peers/kopf_operator:

create      fleets of one replica, so many a second: from the create's answer to the first write
idle        all of them converged: writes by the audit log, share of a core, resident memory
changes     specs changed so many times a second: from the patch's answer to observedGeneration
fail-over   kill -9 of the holder of the Lease, and one change: from the kill to observedGeneration
big         one fleet of 1,000 replicas beside 500 of one, all created at once: to the last pod

One JSON line for each figure, with the goal and whether it was met, and the load average of the
last minute when it was measured; all parts of the cluster share the machine's cores with the
operator. A figure of null was not reached within the limit of its case. Nothing fails on a figure.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "hack" / "cluster"), str(ROOT / "tests" / "e2e")]

from fleets import amd_fleet  # noqa: E402
from kit.nodes import GPUS, manifest  # noqa: E402

from tests.faults.view import Admin, ClusterView  # noqa: E402
from tests.operator.apiserver import (  # noqa: E402
    FLEETS,
    MUTATING,
    ApiServer,
    binaries,
    free_port,
    grant,
    running,
    started,
)

Json = dict[str, Any]
NAMESPACE, HOME = "bench", "tilefleet-system"
IDLE_SECONDS, CHANGE_SECONDS = 30.0, 20.0
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Rates are per second."""

    fleets: int
    create_rate: float
    change_rate: float
    replicas: int
    small: int


@dataclass
class Figure:
    """One measured value and what it should be. below: smaller is better."""

    case: str
    value: float | None
    unit: str
    goal: float
    load: float = field(default_factory=lambda: os.getloadavg()[0])


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


def _cpu(pid: int) -> float:
    with suppress(FileNotFoundError):
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / TICKS
    return 0.0


def _rss(pid: int) -> int:
    with suppress(FileNotFoundError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return 0


class Bench:
    """The cluster, what is seen of it, and the figures of one operator."""

    def __init__(self, api: ApiServer, admin: Admin, view: ClusterView, sizes: Sizes) -> None:
        self.api, self.admin, self.view, self.sizes = api, admin, view, sizes
        self.pending: dict[tuple[str, int], float] = {}
        self.latencies: list[float] = []
        view.listeners.append(self._observe)

    def _observe(self, plural: str, kind: str, body: Json) -> None:
        if plural == "inferencedeployments":
            name = body["metadata"]["name"]
            seen = int((body.get("status") or {}).get("observedGeneration") or 0)
            for key in [key for key in self.pending if key[0] == name and key[1] <= seen]:
                self.latencies.append(time.monotonic() - self.pending.pop(key))

    async def measure(self, who: Candidate) -> list[Figure]:
        """All cases for one operator. A case that was not reached has figures without a value."""
        figures: list[Figure] = []
        who.start()
        try:
            await self._led(who)
            for case in (self._create, self._idle, self._changes, self._failover):
                figures += self._said(who, await case(who))
            await self._clear()
            figures += self._said(who, await self._big(who))
            await self._clear()
        finally:
            who.stop()
        return figures

    def _said(self, who: Candidate, figures: list[Figure]) -> list[Figure]:
        for one in figures:
            value = "not reached" if one.value is None else f"{one.value:.3g} {one.unit}"
            say(f"{who.name}: {one.case}: {value}, goal {one.goal:g}, load {one.load:.1f}")
        return figures

    async def _led(self, who: Candidate) -> None:
        """Until it reacts: a first fleet is reported."""
        say(f"{who.name}: starts")
        await self._make("warm", 1)
        if not await self._until("the first fleet is seen", lambda: self._observed() >= 1, 120):
            raise SystemExit(f"{who.name} does not react: {who.log.read_text()[-2000:]}")

    async def _create(self, who: Candidate) -> list[Figure]:
        position, asked = self.api.audit_position(), {}

        async def one(number: int) -> None:
            name = f"f{number:04d}"
            await self._make(name, 1)
            asked[name] = time.time()

        await _paced(one, self.sizes.fleets, self.sizes.create_rate)
        wanted = self.sizes.fleets + 1
        await self._until("all fleets are reported", lambda: self._observed() >= wanted, 300)
        await self._until("all pods are ready", lambda: self._num_ready() >= wanted, 300)
        first: dict[str, float] = {}
        for name, when in self._writes(who, position):
            first.setdefault(name, when)
        waits = [first[name] - when for name, when in asked.items() if name in first]
        case = f"first write, {self.sizes.fleets} fleets at {self.sizes.create_rate:g}/s"
        return [Figure(f"{case}, p99", percentile(waits, 0.99), "s", 1.0)]

    async def _idle(self, who: Candidate) -> list[Figure]:
        await self._until("nothing is written", self._quiet(who), 60, 1.0)
        position, cpu, begun = self.api.audit_position(), who.cpu_seconds(), time.monotonic()
        await asyncio.sleep(IDLE_SECONDS)
        share = (who.cpu_seconds() - cpu) / (time.monotonic() - begun)
        writes = len(list(self._writes(who, position)))
        case = f"idle, {self.sizes.fleets} fleets"
        return [
            Figure(f"{case}, writes", writes, "writes", 0),
            Figure(f"{case}, CPU", share, "cores", 0.5),
            Figure(f"{case}, memory", who.rss_mib(), "MiB", 500),
        ]

    def _quiet(self, who: Candidate) -> Any:
        last = [self.api.audit_position(), time.monotonic()]

        def check() -> bool:
            if list(self._writes(who, int(last[0]))):
                last[:] = [self.api.audit_position(), time.monotonic()]
            return time.monotonic() - last[1] > 8

        return check

    async def _changes(self, who: Candidate) -> list[Figure]:
        self.latencies.clear()
        cpu, begun = who.cpu_seconds(), time.monotonic()
        count = int(self.sizes.change_rate * CHANGE_SECONDS)

        async def one(number: int) -> None:
            name = f"f{number % self.sizes.fleets:04d}"
            await self._change(name, 2 + number // self.sizes.fleets)

        reached = await _paced(one, count, self.sizes.change_rate)
        await self._until("every change is observed", lambda: not self.pending, 60)
        lost, took = len(self.pending), time.monotonic() - begun
        waits = self.latencies + [60.0 + CHANGE_SECONDS] * lost
        self.pending.clear()
        case = f"change to observedGeneration at {reached:.0f}/s"
        share = (who.cpu_seconds() - cpu) / took
        return [
            Figure(f"{case}, p50", percentile(waits, 0.50), "s", 5.0),
            Figure(f"{case}, p99", percentile(waits, 0.99), "s", 5.0),
            Figure(f"{case}, CPU", share, "cores", 1.0),
        ]

    async def _failover(self, who: Candidate) -> list[Figure]:
        self.latencies.clear()
        leader = who.leader(await self._holder() if who.replicas > 1 else "")
        leader.send_signal(signal.SIGKILL)
        leader.wait()
        begun = time.monotonic()
        who.start()
        await self._change("warm", 3)
        reached = await self._until("the change is observed", lambda: not self.pending, 120)
        took = time.monotonic() - begun if reached else None
        case = f"fail-over, {self.sizes.fleets} fleets, kill -9 of the leader"
        return [Figure(case, took, "s", 20.0)]

    async def _holder(self) -> str:
        """Who holds the operator's Lease; a follower's death would measure nothing."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{HOME}/leases/tilefleet-operator"
        lease = await self.admin.send("GET", path)
        return str(lease["spec"]["holderIdentity"])

    async def _big(self, who: Candidate) -> list[Figure]:
        small, replicas = self.sizes.small, self.sizes.replicas
        begun = time.monotonic()
        await self._make("large", replicas)
        await _paced(lambda number: self._make(f"s{number:04d}", 1), small, 1000.0)
        wanted = small + replicas
        case = f"one fleet of {replicas} replicas beside {small}"
        figures = []
        for what, count in (
            ("to the last pod", self._num_pods),
            ("all pods ready", self._num_ready),
        ):
            reached = await self._until(what, lambda count=count: count() >= wanted, 120)
            took = time.monotonic() - begun if reached else None
            figures.append(Figure(f"{case}, {what}", took, "s", 60.0))
        return figures

    async def _make(self, name: str, replicas: int) -> None:
        path = f"{FLEETS}/namespaces/{NAMESPACE}/inferencedeployments"
        await self.admin.send("POST", path, amd_fleet(name, NAMESPACE, replicas, 1))

    async def _change(self, name: str, value: int) -> None:
        """A change that needs no other pod."""
        path = f"{FLEETS}/namespaces/{NAMESPACE}/inferencedeployments/{name}"
        body = await self.admin.send("PATCH", path, {"spec": {"rollout": {"maxSurge": value}}})
        seen = int((body.get("status") or {}).get("observedGeneration") or 0)
        if body["metadata"]["generation"] > seen:
            self.pending[name, body["metadata"]["generation"]] = time.monotonic()

    async def _clear(self) -> None:
        """Delete every fleet; the garbage collector takes the rest."""
        path = f"{FLEETS}/namespaces/{NAMESPACE}/inferencedeployments"
        say("deletes all fleets")
        await self.admin.send("DELETE", path)
        await self._until("nothing is left", lambda: not self._num_pods(), 120)

    def _observed(self) -> int:
        fleets = self.view.objects["inferencedeployments"].values()
        return sum(
            (one.get("status") or {}).get("observedGeneration") == one["metadata"]["generation"]
            for one in fleets
        )

    def _num_pods(self) -> int:
        return len(self.view.objects["pods"])

    def _num_ready(self) -> int:
        pods = self.view.objects["pods"].values()
        return sum(
            any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
            for pod in pods
            if (conditions := pod.get("status", {}).get("conditions") or [])
        )

    def _writes(self, who: Candidate, position: int) -> AsyncIterator[Any] | Any:
        """(fleet, seconds since the epoch) of each write of an operator, Leases apart."""
        for entry in self.api.audit(position):
            reference = entry.get("objectRef") or {}
            if entry["verb"] not in MUTATING or reference.get("resource") == "leases":
                continue
            found = re.match(r"[a-z]+\d*", reference.get("name", ""))
            if entry["user"]["username"] == who.user and found:
                yield (
                    found[0],
                    datetime.fromisoformat(entry["requestReceivedTimestamp"]).timestamp(),
                )

    async def _until(self, what: str, check: Any, seconds: float, every: float = 0.1) -> bool:
        """Wait for the check to hold; False, and said so, when it does not within the limit."""
        deadline = time.monotonic() + seconds
        while not check():
            if time.monotonic() > deadline:
                say(f"{what}: not within {seconds:g} s")
                return False
            await asyncio.sleep(every)
        return True


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _paced(work: Any, count: int, rate: float) -> float:
    """Start ``work(n)`` at a steady rate, whatever earlier ones take; returns the rate reached."""
    begun, tasks = time.monotonic(), []
    for number in range(count):
        await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
        tasks.append(asyncio.create_task(work(number)))
    await asyncio.gather(*tasks)
    return count / (time.monotonic() - begun)


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile; share 0..1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@asynccontextmanager
async def cluster(sizes: Sizes) -> AsyncIterator[Bench]:
    """Everything but the operators."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        api = stack.enter_context(running(folder))
        programs, admin_file = binaries(), api.kubeconfig("admin")
        fast = ("--kube-api-qps=300", "--kube-api-burst=600", "--leader-elect=false")
        kwok_stages = sorted((Path(programs["kwok"]).parents[1] / "kwok").glob("*.yaml"))
        for argv in (
            [programs["kube-controller-manager"], f"--kubeconfig={admin_file}", "--secure-port=0",
             "--controllers=garbage-collector-controller,node-lifecycle-controller", *fast],
            [programs["kube-scheduler"], f"--kubeconfig={admin_file}", "--secure-port=0", *fast],
            [programs["kwok"], f"--kubeconfig={admin_file}", "--manage-all-nodes=false",
             "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
             "--node-lease-duration-seconds=40", *(f"--config={path}" for path in kwok_stages)],
        ):  # fmt: skip
            stack.enter_context(started(argv, folder / f"{Path(argv[0]).name}.log"))
        context = ssl.create_default_context(cafile=api.authority)
        admin = await stack.enter_async_context(Admin(api.url, api.tokens["admin"], context))
        for name in (HOME, NAMESPACE):
            await admin.send("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        nodes = -(-max(sizes.fleets + 1, sizes.replicas + sizes.small) // GPUS)
        for number in range(nodes):
            await admin.send("POST", "/api/v1/nodes", dict(manifest(number)))
        view = ClusterView(admin)
        watching = asyncio.create_task(view.run())
        try:
            yield Bench(api, admin, view, sizes)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def candidates(api: ApiServer) -> list[Candidate]:
    """Ours, two replicas of which one leads, and the plain kopf operator."""
    ours = [
        sys.executable, "-m", "tilefleet_operator", "run", f"--namespace={HOME}",
        f"--kubeconfig={api.kubeconfig('operator-a')}", "--log-format=text",
        "--worker-cpu-image=worker:1", "--worker-image=worker:1",
    ]  # fmt: skip
    peer = [sys.executable, str(ROOT / "benchmarks" / "peers" / "kopf_operator.py")]
    return [
        Candidate("tilefleet", "operator-a", ours, 2, log=api.folder / "ours.log"),
        Candidate(
            "plain kopf operator", "operator-b", peer, 1,
            {"KUBECONFIG": api.kubeconfig("operator-b")}, log=api.folder / "peer.log",
        ),
    ]  # fmt: skip


def _allow(api: ApiServer) -> None:
    """The chart's rights for ours; all rights for the peer, which has no chart."""
    grant(api, HOME, everywhere=True)
    group = "rbac.authorization.k8s.io"
    binding: Json = {
        "metadata": {"name": "peer"},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": "operator-b"}],
    }
    api.create(f"/apis/{group}/v1/clusterrolebindings", binding)


def line(ours: Figure, theirs: Figure | None) -> Json:
    """The JSON line of one figure."""
    value, other = ours.value, theirs.value if theirs else None
    return {
        "bench": "operator_scale",
        "case": ours.case,
        "value": None if value is None else round(value, 3),
        "unit": ours.unit,
        "goal": ours.goal,
        "met": value is not None and value <= ours.goal,
        "peer": theirs and "plain kopf operator",
        "peer_value": None if other is None else round(other, 3),
        "ratio": round(value / other, 3) if value is not None and other else None,
        "device": _device(),
        "commit": _commit(),
        "load_average": round(ours.load, 1),
    }


def _device() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores for the whole cluster"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleets", type=int, default=1000)
    parser.add_argument("--create-rate", type=float, default=20.0, help="fleets a second")
    parser.add_argument("--change-rate", type=float, default=160.0, help="changes a second")
    parser.add_argument("--replicas", type=int, default=1000, help="of the one large fleet")
    parser.add_argument("--small", type=int, default=500, help="fleets beside it")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--keep-logs", metavar="FOLDER", help="copy the operators' logs there")
    arguments = parser.parse_args()
    sizes = Sizes(
        arguments.fleets, arguments.create_rate, arguments.change_rate, arguments.replicas,
        arguments.small,
    )  # fmt: skip
    async with cluster(sizes) as bench:
        _allow(bench.api)
        results = []
        for who in candidates(bench.api)[: 1 if arguments.no_peer else 2]:
            try:
                results.append(await bench.measure(who))
            finally:
                if arguments.keep_logs:
                    kept = Path(arguments.keep_logs) / who.log.name
                    kept.write_bytes(who.log.read_bytes())
        for number, ours in enumerate(results[0]):
            theirs = results[1][number] if len(results) > 1 else None
            print(json.dumps(line(ours, theirs)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
