"""The sweep: every fault at every write of a fleet's life, each judged against an undisturbed life.

    make test-faults       or, from the root: .venv/bin/python -m tests.faults --faults 409,500

Prints each broken case, a table of counts, and one JSON line. Exit status 1 if any case broke.
"""

import asyncio
import contextlib
import json
import os
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.kubelet import FakeKubelet
from tests.faults.life import STAGES, Golden, Life, Verdict
from tests.faults.operators import (
    LEASE_SECONDS,
    NAMESPACE,
    Clock,
    Launcher,
    Supervisor,
    build_clock_shim,
)
from tests.faults.proxy import ANSWERS, CUTS, PROCESS, WATCHES, FaultProxy
from tests.faults.view import Admin, ClusterView, Json
from tests.operator.apiserver import ApiServer, binaries, grant, running, started

ALONE = PROCESS
"""Faults of a process: each case needs operators of its own."""
SHARED = (*ANSWERS, *CUTS, *WATCHES)
"""Faults of one namespace's requests: one operator serves many cases at once."""
RESTART = "API server restart"
FAULTS = (*SHARED, *ALONE, RESTART)
SHARED_LIVES = 16
GROUPS_AT_A_TIME = 4
PATIENT_SECONDS = 30.0
"""Lease of the operators of SHARED faults: a busy machine must not look like a fault."""
RESTART_LIVES = 8


@dataclass
class Bench:
    """All parts of a running sweep."""

    api: ApiServer
    proxy: FaultProxy
    admin: Admin
    view: ClusterView
    launcher: Launcher
    golden: Golden = field(default_factory=Golden)
    verdicts: list[Verdict] = field(default_factory=list)
    restarts: int = 0

    @property
    def num_writes(self) -> int:
        """Writes of the undisturbed life."""
        return sum(map(len, self.golden.writes.values()))

    def stage_of(self, number: int) -> str:
        """The stage of the undisturbed life's n-th write, counted from 1."""
        for stage in STAGES:
            number -= len(self.golden.writes[stage])
            if number <= 0:
                return stage
        return STAGES[-1]


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    """Start etcd, kube-apiserver, the garbage collector, the proxy and the fake kubelet."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        api = stack.enter_context(running(folder))
        collector = [
            binaries()["kube-controller-manager"], f"--kubeconfig={api.kubeconfig('admin')}",
            "--controllers=garbage-collector-controller", "--leader-elect=false", "--secure-port=0",
            "--kube-api-qps=300", "--kube-api-burst=600",
        ]  # fmt: skip
        stack.enter_context(started(collector, folder / "controller-manager.log"))
        build_clock_shim(folder)
        _grant_everywhere(api)
        context = ssl.create_default_context(cafile=api.authority)
        admin = await stack.enter_async_context(Admin(api.url, api.tokens["admin"], context))
        proxy = await stack.enter_async_context(FaultProxy.running(api.url, context))
        launcher = await stack.enter_async_context(Launcher.running())
        view = ClusterView(admin)
        parts = [
            asyncio.create_task(view.run()),
            asyncio.create_task(FakeKubelet(admin, view).run()),
        ]
        parts.append(asyncio.create_task(_fail_loudly(tuple(parts))))
        try:
            yield Bench(api, proxy, admin, view, launcher)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def _fail_loudly(parts: Sequence[asyncio.Task[None]]) -> None:
    """A judge that died must not look like a fleet that hangs."""
    done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_EXCEPTION)
    for part in done:
        if not part.cancelled() and part.exception() is not None:
            print(f"the sweep's own part ended: {part.exception()!r}", flush=True)
            part.print_stack()
            os._exit(2)


def _grant_everywhere(api: ApiServer) -> None:
    """The chart's rights in all namespaces, and Leases: each case has one in its own."""
    api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    grant(api, NAMESPACE, everywhere=True)
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    rules = [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
         "verbs": ["get", "create", "update"]}
    ]  # fmt: skip
    api.create(f"{rbac}/clusterroles", {"metadata": {"name": "leases"}, "rules": rules})
    group = "rbac.authorization.k8s.io"
    role = {"apiGroup": group, "kind": "ClusterRole", "name": "leases"}
    subjects = [
        {"apiGroup": group, "kind": "User", "name": f"operator-{letter}"} for letter in "ab"
    ]
    binding: Json = {"metadata": {"name": "leases"}, "roleRef": role, "subjects": subjects}
    api.create(f"{rbac}/clusterrolebindings", binding)


async def undisturbed(bench: Bench) -> None:
    """Live two lives without faults: the first becomes the measure, the second proves it stable."""
    names = ("golden", "golden-again")
    first, again = (Life(bench.admin, bench.view, name, bench.golden) for name in names)
    for life in (first, again):
        await life.born()
    supervisor = Supervisor(
        bench.api, bench.proxy, bench.launcher, names, lease_seconds=PATIENT_SECONDS
    )
    async with supervisor.running():
        for life in (first, again):
            for stage in STAGES:
                script = bench.proxy.script(life.namespace)
                before = len(script.writes)
                await life.begin(stage)
                if life is first:
                    bench.golden.states[stage] = await life.settle(stage)
                    bench.golden.created[stage] = life.created[stage]
                    bench.golden.writes[stage] = script.writes[before:]
                else:
                    await life.reach(stage, 30)
                say(f"undisturbed {stage}: {len(script.writes) - before} writes")
            if life.problems:
                break
    for life in (first, again):
        if life.problems:
            raise AssertionError(f"the undisturbed life is not stable: {life.problems}")


async def live(bench: Bench, life: Life, fault: str, at: int, after: Callable[[], Any]) -> None:
    """One life up to the end of the stage in which the fault came, then its deletion."""
    script = bench.proxy.script(life.namespace)
    script.fault, script.at = fault, at
    verdict = Verdict(life.namespace, fault, at)
    started_at = time.monotonic()
    for stage in STAGES:
        if verdict.stage and stage != STAGES[-1]:
            continue
        await life.begin(stage)
        reach = asyncio.create_task(life.reach(stage))
        await asyncio.wait(
            (reach, asyncio.create_task(script.struck.wait())),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if script.fired and not verdict.stage:
            verdict.stage = stage
            await after()
        await reach
    verdict.problems = list(life.problems)
    verdict.problems += [f"repeated before Retry-After: {what}" for what in script.impatient]
    verdict.seconds = time.monotonic() - started_at
    bench.view.listeners.remove(life._observe)
    conclude(bench, verdict)


def conclude(bench: Bench, verdict: Verdict) -> None:
    """Take a verdict, and say it at once."""
    bench.verdicts.append(verdict)
    outcome = f"{len(verdict.problems)} problems" if verdict.problems else "equal"
    where = f"{verdict.fault} at write {verdict.at} ({verdict.stage or 'not reached'})"
    say(f"{where}: {outcome} in {verdict.seconds:.0f} s")
    for problem in verdict.problems:
        print(f"BROKEN {where} in {verdict.namespace}: {problem}", flush=True)


async def shared(bench: Bench, cases: Sequence[tuple[str, int]], tag: str) -> None:
    """Cases of one operator that watches a namespace for each."""
    lives = [
        Life(bench.admin, bench.view, f"{tag}-{number}", bench.golden)
        for number in range(len(cases))
    ]
    for life in lives:
        await life.born()
    names = [life.namespace for life in lives]
    supervisor = Supervisor(
        bench.api, bench.proxy, bench.launcher, names, lease_seconds=PATIENT_SECONDS
    )
    async with supervisor.running():
        await asyncio.gather(
            *(live(bench, life, *case, _nothing) for life, case in zip(lives, cases, strict=True))
        )
    _judge_exits(bench, supervisor)


async def _nothing() -> None:
    return


def _judge_exits(bench: Bench, supervisor: Supervisor) -> None:
    """No fault of a request may end the process; a Lease lost on a slow machine may."""
    ends = [line for line in supervisor.log.read_text().splitlines() if " CRITICAL " in line]
    lost = [line for line in ends if "has not renewed its Lease" in line]
    if len(ends) > len(lost) or len(supervisor.exits) > len(lost):
        problem = f"the operator ended {supervisor.exits}: {ends}"
        conclude(bench, Verdict(supervisor.name, "ended", 0, problems=[problem]))


async def alone(bench: Bench, fault: str, at: int, tag: str) -> None:
    """One case with operators of its own."""
    life = Life(bench.admin, bench.view, tag, bench.golden)
    await life.born()
    async with AsyncExitStack() as stack:
        clock = Clock(bench.api.folder / f"{tag}.clock") if fault.startswith("clock") else None
        if clock is not None:
            shim = bench.api.folder / "clock_shim.so"
            assert shim.exists()
        first = Supervisor(bench.api, bench.proxy, bench.launcher, [tag])
        await stack.enter_async_context(first.running(clock))
        pair = [first]
        if fault == "stopped":
            pair.append(Supervisor(bench.api, bench.proxy, bench.launcher, [tag], "operator-b"))
            await stack.enter_async_context(pair[1].running())

        async def after() -> None:
            if fault == "stopped":
                await _freeze_past_lease(bench, pair, tag)

        await live(bench, life, fault, at, after)


async def _freeze_past_lease(bench: Bench, pair: Sequence[Supervisor], tag: str) -> None:
    """Hold the stopped leader until another leads, then let it go on: it must end, not write."""
    victim = bench.proxy.script(tag).victim
    stopped = next(one for one in pair if one.candidate is victim)
    await asyncio.sleep(LEASE_SECONDS * 1.5)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        held = bench.proxy.holder(tag)
        if held is not None and held is not victim:
            break
        await asyncio.sleep(0.1)
    before = len(stopped.exits)
    stopped.thaw()
    while len(stopped.exits) == before:
        if time.monotonic() > deadline:
            conclude(bench, Verdict(tag, "stopped", 0, problems=["it went on after its Lease"]))
            return
        await asyncio.sleep(0.1)


async def restarted(bench: Bench, pauses: Iterable[float], tag: str) -> None:
    """Lives that begin one after another while the API server is killed and started again."""
    lives = [
        Life(bench.admin, bench.view, f"{tag}-{n}", bench.golden) for n in range(RESTART_LIVES)
    ]
    for life in lives:
        await life.born()
    names = [life.namespace for life in lives]
    supervisor = Supervisor(bench.api, bench.proxy, bench.launcher, names)

    async def one(number: int, life: Life) -> None:
        await asyncio.sleep(number * 1.5)
        verdict = Verdict(life.namespace, RESTART, number, stage="all")
        for stage in STAGES:
            await life.begin(stage)
            await life.reach(stage)
        verdict.problems = list(life.problems)
        conclude(bench, verdict)

    async def disturb() -> None:
        for pause in pauses:
            await asyncio.sleep(pause)
            await asyncio.to_thread(bench.api.restart)
            bench.restarts += 1

    async with supervisor.running():
        await asyncio.gather(disturb(), *(one(*pair) for pair in enumerate(lives)))


async def sweep(bench: Bench, faults: Sequence[str], points: Sequence[int] = ()) -> None:
    """All cases: the faults at these writes, or at each."""
    await undisturbed(bench)
    points = points or range(1, bench.num_writes + 1)
    limit = asyncio.Semaphore(GROUPS_AT_A_TIME)
    cases = [(fault, at) for at in points for fault in faults if fault in SHARED]

    async def bounded(work: Any) -> None:
        async with limit:
            await work

    jobs: list[Any] = [
        shared(bench, cases[start : start + SHARED_LIVES], f"shared-{start}")
        for start in range(0, len(cases), SHARED_LIVES)
    ]
    for fault in faults:
        if fault in ALONE:
            jobs += [alone(bench, fault, at, f"{_slug(fault)}-{at}") for at in points]
    await asyncio.gather(*map(bounded, jobs))
    if RESTART in faults:
        for number, pause in enumerate((3.0, 5.0)):
            await restarted(bench, [pause, pause, pause], f"restart-{number}")


def _slug(text: str) -> str:
    return text.replace("+", "plus").replace("-1", "minus-1").replace(" ", "-")


def report(bench: Bench, seconds: float) -> Json:
    """The table on standard output, and its figures."""
    table: dict[str, Counter[str]] = {}
    for verdict in bench.verdicts:
        row = table.setdefault(verdict.fault, Counter())
        row["cases"] += 1
        row["equal"] += not verdict.problems
        row[verdict.stage or "not reached"] += 1
    columns = ("cases", "equal", *STAGES, "all", "not reached")
    print(f"{'fault':20}" + "".join(f"{name:>12}" for name in columns))
    for fault, row in sorted(table.items()):
        print(f"{fault:20}" + "".join(f"{row[name] or '-':>12}" for name in columns))
    for trespass in bench.proxy.trespasses:
        print(f"BROKEN written without the Lease: {trespass}")
    cases = sum(row["cases"] for row in table.values())
    writes = sum(len(script.writes) for script in bench.proxy.scripts.values())
    return {
        "bench": "faults",
        "cases": cases,
        "equal": sum(row["equal"] for row in table.values()),
        "fired": cases - sum(row["not reached"] for row in table.values()),
        "writes_without_lease": len(bench.proxy.trespasses),
        "writes_of_the_undisturbed_life": {
            stage: len(found) for stage, found in bench.golden.writes.items()
        },
        "writes_seen": writes,
        "requests": bench.proxy.requests,
        "api_server_restarts": bench.restarts,
        "seconds": round(seconds, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


async def run(faults: Sequence[str], points: Sequence[int] = ()) -> Json:
    """A whole sweep; returns its figures."""
    begun = time.monotonic()
    async with bench() as made:
        await sweep(made, faults, points)
        figures = report(made, time.monotonic() - begun)
        print(json.dumps(figures), flush=True)
        return figures


def whole(figures: Json) -> bool:
    """Whether every case held."""
    return figures["cases"] == figures["equal"] and not figures["writes_without_lease"]


__all__ = ["FAULTS", "bench", "contextlib", "run", "sweep", "whole"]
