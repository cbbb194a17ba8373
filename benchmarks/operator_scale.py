"""The operator at 1,000 fleets, beside a plain kopf operator, on one real API server.

    make bench-operator        or, from the root: .venv/bin/python benchmarks/operator_scale.py

Starts everything it needs in a folder of its own, says on standard error what it does, and ends it
all, within twelve minutes on a quiet machine of two cores.

Real: etcd, kube-apiserver with audit log, kube-scheduler, the garbage collector, kwok, which keeps
MI300X nodes and their pods alive. Cases, each for ours and then for benchmarks/peers/kopf_operator:

create      most fleets as fast as the cluster takes them, then the last ones so many a second: from
            the create's answer to the first write
idle        all of them converged: writes by the audit log, share of a core, resident memory
changes     specs changed so many times a second, or as fast as the cluster takes it: from the
            patch's answer to observedGeneration, and CPU of a change; then at half that rate
fail-over   kill -9 of the holder of the Lease, and one change: from the kill to observedGeneration
big         one fleet of 1,000 replicas beside 500 of one, all created at once: to the last pod

One JSON line for each figure, with the goal and whether it was met, and the load average of the
last minute when it was measured; all parts of the cluster share the machine's cores with the
operator. Each write costs the API server several milliseconds of CPU, and a new fleet some 15 of
them (ours, the scheduler's, kwok's), hence 5 a second by default. A figure of null was not reached
within the limit of its case. An operator that ends is started again, as a kubelet would, and
counted. Nothing fails on a figure.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / path) for path in ("", "benchmarks/scale", "hack/cluster", "tests/e2e")]

from audit import requests, writes  # noqa: E402
from candidates import HOME, Candidate, allow, candidates, cluster_cpu_seconds  # noqa: E402
from figures import Figure, line, percentile  # noqa: E402
from fleets import amd_fleet  # noqa: E402
from simulated_cluster import simulated_cluster  # noqa: E402

from tests.faults.view import Admin, ClusterView  # noqa: E402
from tests.operator.apiserver import FLEETS, ApiServer  # noqa: E402

Json = dict[str, Any]
NAMESPACE = "bench"
IDLE_SECONDS, CHANGE_SECONDS, HALF_RATE_SECONDS = 30.0, 12.0, 12.0
SURGES = 997  # of rollout.maxSurge; prime, so that a fleet's next one differs from its last
PACED = 200
"""Fleets whose first write is timed; those before them only have to be there."""
CORES = os.cpu_count() or 1
CONNECTIONS = 32
"""Requests of the users at a time; a TLS handshake for each would be a load of its own."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Rates are per second."""

    fleets: int
    create_rate: float
    change_rate: float
    replicas: int
    small: int


class Bench:
    """The cluster, what is seen of it, and the figures of one operator."""

    def __init__(self, api: ApiServer, admin: Admin, view: ClusterView, sizes: Sizes) -> None:
        self.api, self.admin, self.view, self.sizes = api, admin, view, sizes
        self.pending: dict[str, dict[int, float]] = {}
        self.latencies: list[float] = []
        self.rounds = 0
        self.connections = asyncio.Semaphore(CONNECTIONS)
        self.deadline = math.inf
        view.listeners.append(self._observe)

    def _observe(self, plural: str, kind: str, body: Json) -> None:
        if plural == "inferencedeployments":
            asked = self.pending.get(body["metadata"]["name"], {})
            seen = int((body.get("status") or {}).get("observedGeneration") or 0)
            for generation in [one for one in asked if one <= seen]:
                self.latencies.append(time.monotonic() - asked.pop(generation))

    def _num_pending(self) -> int:
        return sum(map(len, self.pending.values()))

    async def measure(self, who: Candidate, deadline: float, last: bool) -> list[Figure]:
        """All cases for one operator, until the deadline of the monotonic clock.

        A wait that ends without success gives a figure without a value; a case that fails gives
        none. last: nobody needs an empty cluster afterwards.
        """
        figures: list[Figure] = []
        who.start()
        self.deadline = deadline
        supervisor = asyncio.create_task(_supervise(who))
        try:
            await self._led(who)
            for case in (self._create, self._idle, self._changes, self._failover, self._big):
                if case == self._big:
                    await self._clear()
                try:
                    figures += self._said(who, await case(who))
                except Exception as error:
                    say(f"{who.name}: {case.__name__.strip('_')} failed: {error!r}")
            if not last:
                self.deadline = math.inf
                await self._clear()
            supervisor.cancel()
            ended = Figure("operator processes that ended by themselves", who.ended, "", 0)
            figures += self._said(who, [ended])
        finally:
            supervisor.cancel()
            who.stop()
        return figures

    def _said(self, who: Candidate, figures: list[Figure]) -> list[Figure]:
        for one in figures:
            value = "not reached" if one.value is None else f"{one.value:.3g} {one.unit}"
            more = f", {one.note}" if one.note else ""
            say(f"{who.name}: {one.case}: {value}{more}, goal {one.goal:g}, load {one.load:.1f}")
        return figures

    async def _led(self, who: Candidate) -> None:
        """Until it reacts: a first fleet is reported."""
        say(f"{who.name}: starts")
        await self._make("warm", 1)
        if not await self._until("the first fleet is seen", lambda: self._observed() >= 1, 120):
            raise TimeoutError(f"{who.name} does not react: {who.log.read_text()[-2000:]}")

    async def _create(self, who: Candidate) -> list[Figure]:
        count = self.sizes.fleets - min(PACED, self.sizes.fleets // 2)
        await asyncio.gather(*(self._make(f"f{number:04d}", 1) for number in range(count)))
        await self._until("most fleets are there", lambda: self._num_ready() > count, 180)
        await self._until("nothing is written", self._quiet(who), 60, 1.0)
        position, asked = self.api.audit_position(), {}

        async def one(number: int) -> None:
            name = f"f{count + number:04d}"
            await self._make(name, 1)
            asked[name] = time.time()

        timed = self.sizes.fleets - count
        await _paced(one, timed, self.sizes.create_rate)
        wanted = self.sizes.fleets + 1
        await self._until("all fleets are reported", lambda: self._observed() >= wanted, 180)
        await self._until("all pods are ready", lambda: self._num_ready() >= wanted, 120)
        first: dict[str, float] = {}
        for name, when in writes(self.api, who.user, position):
            first.setdefault(name, when)
        waits = [first[name] - when for name, when in asked.items() if name in first]
        waits += [math.inf] * (timed - len(waits))
        rate = f"{self.sizes.create_rate:g}/s"
        case = f"first write, last {timed} of {self.sizes.fleets} fleets at {rate}"
        cost = requests(self.api, who.user, position) / timed
        return [
            Figure(f"{case}, p50", percentile(waits, 0.50), "s", 1.0),
            Figure(f"{case}, p99", percentile(waits, 0.99), "s", 1.0),
            Figure("requests of a new fleet of one replica", cost, "requests", 10.0),
        ]

    async def _idle(self, who: Candidate) -> list[Figure]:
        await self._until("nothing is written", self._quiet(who), 60, 1.0)
        position, cpu, begun = self.api.audit_position(), who.cpu_seconds(), time.monotonic()
        await asyncio.sleep(IDLE_SECONDS)
        share = (who.cpu_seconds() - cpu) / (time.monotonic() - begun)
        written = len(list(writes(self.api, who.user, position)))
        case = f"idle, {self.sizes.fleets} fleets"
        return [
            Figure(f"{case}, writes", written, "writes", 0),
            Figure(f"{case}, CPU", share, "cores", 0.5),
            Figure(f"{case}, memory", who.rss_mib(), "MiB", 500),
        ]

    def _quiet(self, who: Candidate) -> Any:
        last = [self.api.audit_position(), time.monotonic()]

        def check() -> bool:
            if list(writes(self.api, who.user, int(last[0]))):
                last[:] = [self.api.audit_position(), time.monotonic()]
            return time.monotonic() - last[1] > 8

        return check

    async def _changes(self, who: Candidate) -> list[Figure]:
        rate, position = self.sizes.change_rate, self.api.audit_position()
        cpu, all_cpu, begun = who.cpu_seconds(), cluster_cpu_seconds(), time.monotonic()
        count = int(rate * CHANGE_SECONDS)
        reached, figures = await self._change_all("change to observedGeneration", rate, count)
        took, each = time.monotonic() - begun, 1000 / count
        cpu, all_cpu = who.cpu_seconds() - cpu, cluster_cpu_seconds() - all_cpu
        asked, room = requests(self.api, who.user, position) / count, 1000 * CORES / rate
        half = "change to observedGeneration at half the rate reached"
        _, calm = await self._change_all(half, reached / 2, int(reached / 2 * HALF_RATE_SECONDS))
        return [
            Figure("rate of changes reached", reached, "changes/s", 0.95 * rate, at_least=True),
            *figures,
            Figure("operator while specs change, CPU", cpu / took, "cores", 1.0),
            Figure("CPU of a change, operator", cpu * each, "ms", room / 3),
            Figure("CPU of a change, whole cluster", all_cpu * each, "ms", room),
            Figure("requests of a change", asked, "requests", 1.0),
            *calm,
        ]

    async def _change_all(self, case: str, rate: float, count: int) -> tuple[float, list[Figure]]:
        """So many changes at a rate; the rate reached, p50 and p99 of their answers."""
        self.latencies.clear()

        async def one(number: int) -> None:
            await self._change(f"f{number % self.sizes.fleets:04d}")

        reached = await _paced(one, count, rate)
        await self._until("every change is observed", lambda: not self._num_pending(), 60)
        lost = self._num_pending()
        waits = self.latencies + [math.inf] * lost
        self.pending.clear()
        note = f"{rate:.0f}/s asked, {reached:.0f}/s reached, {lost} of {count} not observed"
        return reached, [
            Figure(f"{case}, p50", percentile(waits, 0.50), "s", 5.0, note),
            Figure(f"{case}, p99", percentile(waits, 0.99), "s", 5.0, note),
        ]

    async def _failover(self, who: Candidate) -> list[Figure]:
        self.latencies.clear()
        leader = who.leader(await self._holder() if who.replicas > 1 else "")
        leader.send_signal(signal.SIGKILL)
        leader.wait()
        begun = time.monotonic()
        who.start()
        await self._change("warm")
        reached = await self._until("the change is observed", lambda: not self._num_pending(), 120)
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
        async with self.connections:
            await self.admin.send("POST", path, amd_fleet(name, NAMESPACE, replicas, 1))

    async def _change(self, name: str) -> None:
        """A change that needs no other pod."""
        self.rounds += 1
        value = 2 + self.rounds % SURGES
        path = f"{FLEETS}/namespaces/{NAMESPACE}/inferencedeployments/{name}"
        async with self.connections:
            body = await self.admin.send("PATCH", path, {"spec": {"rollout": {"maxSurge": value}}})
        seen = int((body.get("status") or {}).get("observedGeneration") or 0)
        if body["metadata"]["generation"] > seen:
            asked = self.pending.setdefault(name, {})
            asked[body["metadata"]["generation"]] = time.monotonic()

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

    async def _until(self, what: str, check: Any, seconds: float, every: float = 0.1) -> bool:
        """Wait for the check to hold; False, and said so, when it does not within the limit."""
        deadline = min(time.monotonic() + seconds, self.deadline)
        while not check():
            if time.monotonic() > deadline:
                say(f"{what}: not within {seconds:g} s, or not before the end of the run")
                return False
            await asyncio.sleep(every)
        return True


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _supervise(who: Candidate) -> None:
    while True:
        await asyncio.sleep(0.5)
        who.supervise()


async def _paced(work: Any, count: int, rate: float) -> float:
    """Start ``work(n)`` at a steady rate, whatever earlier ones take; returns the rate reached."""
    begun, tasks = time.monotonic(), []
    for number in range(count):
        await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
        tasks.append(asyncio.create_task(work(number)))
    await asyncio.gather(*tasks)
    return count / (time.monotonic() - begun)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleets", type=int, default=1000)
    parser.add_argument("--create-rate", type=float, default=5.0, help="fleets a second")
    parser.add_argument("--change-rate", type=float, default=160.0, help="changes a second")
    parser.add_argument("--replicas", type=int, default=1000, help="of the one large fleet")
    parser.add_argument("--small", type=int, default=500, help="fleets beside it")
    parser.add_argument("--minutes", type=float, default=11.5, help="of the whole run, at most")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--keep-logs", metavar="FOLDER", help="copy the operators' logs there")
    arguments, begun = parser.parse_args(), time.monotonic()
    sizes = Sizes(
        arguments.fleets, arguments.create_rate, arguments.change_rate, arguments.replicas,
        arguments.small,
    )  # fmt: skip
    room = max(sizes.fleets + 1, sizes.replicas + sizes.small)
    async with simulated_cluster(room) as (api, admin, view):
        bench = Bench(api, admin, view, sizes)
        for name in (HOME, NAMESPACE):
            await admin.send("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        allow(api)
        results: list[dict[str, Figure]] = []
        who = candidates(bench.api)[: 1 if arguments.no_peer else 2]
        for one, share in zip(who, (0.65, 1.0), strict=False):
            last, deadline = one is who[-1], begun + share * 60 * arguments.minutes
            try:
                found = await bench.measure(one, deadline, last)
                results.append({figure.case: figure for figure in found})
            except TimeoutError as error:
                say(str(error))
                results.append({})
            finally:
                if arguments.keep_logs:
                    kept = Path(arguments.keep_logs) / one.log.name
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_bytes(one.log.read_bytes())
        theirs = results[1] if len(results) > 1 else {}
        for case, ours in results[0].items():
            print(json.dumps(line(ours, theirs.get(case))), flush=True)
    return 0 if results[0] else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
