"""The sweep: every fault at every write of a fleet's life, each judged against an undisturbed life.

    make test-faults       or, from the root: .venv/bin/python -m tests.faults --faults 409,500

Prints each broken case, a table of counts, and one JSON line. Exit status 1 if any case broke.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from tests.faults.bench import Bench, bench, undisturbed
from tests.faults.cases import alone, shared
from tests.faults.operators import LEASE_SECONDS
from tests.faults.proxy import ANSWERS, CUTS, PROCESS, RESTART, WATCHES
from tests.faults.results import Case, Point, Results, say
from tests.faults.view import Json

ALONE = PROCESS
"""Faults of a process: each case needs operators of its own."""
SHARED = (*ANSWERS, *CUTS, *WATCHES)
"""Faults of one namespace's requests: one operator serves many cases at once."""
FAULTS = (*SHARED, *ALONE, RESTART)
WITHOUT_WRITE = (*WATCHES, *ALONE, RESTART)
"""Faults that can come where the operator writes nothing: at the deletion, which is the garbage
collector's work."""
SHARED_LIVES = 16
LANES = 16
"""Operators at a time. Cases wait far more than they work."""

Job = Callable[[], Coroutine[Any, Any, None]]


def all_cases(faults: Sequence[str], points: Sequence[Point]) -> list[Case]:
    """Each fault at each of the points at which it can come; the slow faults first."""
    ordered = sorted(faults, key=lambda fault: (fault != "watch half-open", FAULTS.index(fault)))
    return [
        (fault, at) for fault in ordered for at in points if at.number or fault in WITHOUT_WRITE
    ]


async def sweep(made: Bench, faults: Sequence[str], points: Sequence[Point], lanes: int) -> None:
    """All cases that have no verdict yet: the faults at these writes, or at each."""
    results = made.results
    await undisturbed(made)
    if not points:
        results.begin(made.num_writes)
    wanted = all_cases(faults, points or _every(results))
    missing = results.missing(wanted)
    results.start(len(missing))
    say(f"{len(wanted)} cases, {len(missing)} of them to live")
    groups = enumerate(_groups([case for case in missing if case[0] in SHARED]))
    together = [partial(shared, made, some, f"shared-{number}") for number, some in groups]
    single = [
        partial(alone, made, (fault, at), f"{_slug(fault)}-{_slug(str(at))}")
        for fault, at in missing
        if fault in ALONE
    ]
    lanes_together = max(1, lanes // 4)  # a group is as heavy as several cases
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_at_most(lanes_together, together))
        tasks.create_task(_at_most(max(1, lanes - lanes_together), single))
    # Each is felt by all: they come last, and one group after another.
    for number, some in enumerate(_groups([case for case in missing if case[0] == RESTART])):
        await shared(made, some, f"restart-{number}")


def _every(results: Results) -> list[Point]:
    writes = results.num_writes.items()
    every = [Point(stage, number + 1) for stage, count in writes for number in range(count)]
    return [*every, *(Point(stage, 0) for stage, count in writes if count == 0)]


def _groups(cases: Sequence[Case]) -> list[Sequence[Case]]:
    return [cases[start : start + SHARED_LIVES] for start in range(0, len(cases), SHARED_LIVES)]


async def _at_most(lanes: int, jobs: Sequence[Job]) -> None:
    limit = asyncio.Semaphore(lanes)

    async def bounded(job: Job) -> None:
        async with limit:
            await job()

    async with asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(bounded(job))


def _slug(text: str) -> str:
    return text.replace("+", "plus").replace("-1", "minus-1").replace(" ", "-").replace(":", "-")


async def run(
    faults: Sequence[str],
    points: Sequence[Point] = (),
    results: Results | None = None,
    lanes: int = LANES,
    lease_seconds: float = LEASE_SECONDS,
) -> Json:
    """A whole sweep; returns its figures."""
    results = results or Results()
    begun, figures = time.monotonic(), {}
    known = points or (_every(results) if results.num_writes else ())
    if not known or results.missing(all_cases(faults, known)):
        async with bench(results, lease_seconds) as made:
            await sweep(made, faults, points, lanes)
            figures = {
                "writes_of_the_undisturbed_life": {
                    stage: len(found) for stage, found in made.golden.writes.items()
                },
                "requests": made.proxy.requests,
                "api_server_restarts": made.restarts,
                "seconds": round(time.monotonic() - begun, 1),
                "load_average": round(os.getloadavg()[0], 1),
            }
    figures = results.figures() | figures
    print(results.table(faults))
    print(json.dumps(figures), flush=True)
    return figures
