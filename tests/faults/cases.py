"""How the cases of each kind of fault are lived, and judged against the undisturbed life."""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from tests.faults.bench import Bench
from tests.faults.life import STAGES, STEADY_SECONDS, Life, Problem
from tests.faults.operators import Clock, Supervisor
from tests.faults.proxy import RESTART, Candidate
from tests.faults.results import Case, Point, Verdict

TAKE_OVER_SECONDS = 120.0
"""Far more than a follower needs for a Lease that ended, or a process to end: machines are busy."""

Leader = Callable[[], Candidate | None]
After = Callable[[], Coroutine[Any, Any, list[Problem]]]


async def live(
    bench: Bench, life: Life, case: Case, leader: Leader, after: After | None = None
) -> None:
    """One life up to the end of the stage in which the fault comes, then its deletion."""
    fault, at = case
    script = bench.proxy.script(life.namespace)
    verdict = Verdict(fault, at)
    limit = bench.limit_seconds * (2 if fault == RESTART else 1)
    begun = time.monotonic()
    for stage in _stages(at):
        here = stage == at.stage
        if here:
            # What the stage before still writes counts for this one.
            script.fault = fault
            script.at = len(script.writes) + at.number if at.number else 0
        await life.begin(stage)
        if here and not at.number:
            await _strike(bench, life.namespace, leader)
        await _until_struck_or_reached(life, stage, script.struck, limit)
        if here and not script.fired:
            await asyncio.sleep(STEADY_SECONDS)  # one more status may come
        script.at = 0  # the next stage is not disturbed
        if here and script.fired:
            verdict.reached = True
            if after is not None:
                verdict.problems += await after()
        await life.reach(stage, limit, STEADY_SECONDS if here else 0.0)
    life.over()
    verdict.problems += life.problems
    verdict.problems += [Problem("impatient", what) for what in script.impatient]
    verdict.problems += [Problem("non-leader", what) for what in script.trespasses]
    verdict.seconds = round(time.monotonic() - begun, 1)
    verdict.looks, verdict.writes = life.looks, len(script.writes)
    verdict.pods = sum(life.created.values())
    bench.results.take(verdict)


def _stages(at: Point) -> tuple[str, ...]:
    """What is lived: all stages up to that of the fault; a deletion needs a fleet only."""
    last = STAGES[-1]
    if at.stage == last:
        return (STAGES[0], last)
    return (*STAGES[: STAGES.index(at.stage) + 1], last)


async def _until_struck_or_reached(
    life: Life, stage: str, struck: asyncio.Event, limit: float
) -> None:
    waiting = [
        asyncio.create_task(life.arrived(stage)),
        asyncio.create_task(struck.wait()),
    ]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=limit)
    for one in waiting:
        one.cancel()
    for end in await asyncio.gather(*waiting, return_exceptions=True):
        if isinstance(end, Exception):
            raise end


async def _strike(bench: Bench, namespace: str, leader: Leader) -> None:
    """The fault now, without a write: as soon as there is a leader."""
    deadline = time.monotonic() + TAKE_OVER_SECONDS
    while (found := leader()) is None and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    if found is not None:
        bench.proxy.strike(namespace, found)


async def shared(bench: Bench, cases: Sequence[Case], tag: str) -> None:
    """Cases of one operator that watches a namespace for each."""
    lives = [await bench.life(f"{tag}-{number}") for number in range(len(cases))]
    operator = bench.operator(
        [life.namespace for life in lives], lease_seconds=bench.patient_seconds
    )
    async with operator.running(), asyncio.TaskGroup() as group:
        for life, case in zip(lives, cases, strict=True):
            group.create_task(live(bench, life, case, lambda: operator.candidate))
    _judge_exits(bench, operator)


def _judge_exits(bench: Bench, operator: Supervisor) -> None:
    """No fault of a request may end the process; a Lease lost on a slow machine may."""
    ends = [line for line in operator.said().splitlines() if " CRITICAL " in line]
    lost = [line for line in ends if "has not renewed its Lease" in line]
    if len(ends) > len(lost) or len(operator.exits) > len(lost):
        problem = Problem("process", f"the operator ended {operator.exits}: {ends}")
        bench.results.take(Verdict(operator.name, Point("all", 0), True, [problem]))


async def alone(bench: Bench, case: Case, tag: str) -> None:
    """One case with operators of its own."""
    life = await bench.life(tag)
    async with AsyncExitStack() as stack:
        fault = case[0]
        clock = Clock(bench.api.folder / f"{tag}.clock") if fault.startswith("clock") else None
        pair = [bench.operator([tag])]
        await stack.enter_async_context(pair[0].running(clock))
        if fault != "stopped":
            await live(bench, life, case, lambda: bench.proxy.holder(tag))
            return
        pair.append(bench.operator([tag], "operator-b"))
        await stack.enter_async_context(pair[1].running())

        async def after() -> list[Problem]:
            return await _freeze_past_lease(bench, pair, tag)

        await live(bench, life, case, lambda: bench.proxy.holder(tag), after)


async def _freeze_past_lease(bench: Bench, pair: Sequence[Supervisor], tag: str) -> list[Problem]:
    """Hold the stopped leader until another leads, then let it go on: it must end, not write."""
    victim = bench.proxy.script(tag).victim
    stopped = [one for one in pair if one.candidate is victim]
    if victim is None or not victim.pid or not stopped:
        return []  # it had lost its Lease and ended before the signal: nothing was stopped
    before, problems = len(stopped[0].exits), []
    await asyncio.sleep(bench.lease_seconds)
    if not await _within(lambda: bench.proxy.holder(tag) not in (None, victim)):
        problems.append(Problem("process", "nobody else led while the leader was stopped"))
    victim.send(signal.SIGCONT)
    if not await _within(lambda: len(stopped[0].exits) > before):
        problems.append(Problem("process", "the stopped leader went on after its Lease"))
    return problems


async def _within(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TAKE_OVER_SECONDS
    while not true():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True
