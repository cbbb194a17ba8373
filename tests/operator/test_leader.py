"""The tasks of a leader, with kopf and the API server replaced by fakes that the test drives."""

import asyncio
from typing import Any

import pytest

from tests.operator.builders import DEFAULTS, document
from tilefleet_operator.client import ListResult
from tilefleet_operator.errors import ApiError
from tilefleet_operator.leader import Leader, LeaderTiming
from tilefleet_operator.login import Login
from tilefleet_operator.telemetry import Telemetry
from tilefleet_operator.workqueue import Key

KEY = ("team", "llm")
QUICK = LeaderTiming(
    workers=2, resync_seconds=60, relist_seconds=0.02, retry_seconds=0.02, stop_seconds=0.5
)


class FakeLists:
    """Lists one fleet; fails as often as it is told to."""

    def __init__(self) -> None:
        self.failures = 0
        self.lists = 0

    async def list(self, resource: Any, namespace: Any = None, **_: Any) -> ListResult:
        if self.failures:
            self.failures -= 1
            raise ApiError(0, "Unreachable", "no answer")
        if resource.plural != "inferencedeployments":
            return ListResult((), "5")
        self.lists += 1
        body = document()
        body["metadata"]["resourceVersion"] = "1"
        return ListResult((body,), "5")


class FakeKopfLeader(Leader):
    """Without kopf's watches."""

    async def _kopf(self, ready: asyncio.Event) -> None:
        ready.set()
        await self._stop_kopf.wait()


class Harness:
    def __init__(self) -> None:
        self.api = FakeLists()
        login = Login("http://x", None, lambda: None)
        self.leader = FakeKopfLeader(
            self.api,  # type: ignore[arg-type]
            login,
            Telemetry(),
            DEFAULTS,
            "me",
            timing=QUICK,
        )
        self.reconciled: list[Key] = []
        self.finish = asyncio.Event()
        self.finish.set()
        self.finished = 0
        self.leader.reconciler.reconcile = self.reconcile  # type: ignore[method-assign]

    async def reconcile(self, key: Key) -> float | None:
        self.reconciled.append(key)
        await self.finish.wait()
        self.finished += 1
        return None

    async def until(self, check: Any) -> None:
        async with asyncio.timeout(5):
            while not check():
                await asyncio.sleep(0.005)


@pytest.fixture
async def harness() -> Any:
    harness = Harness()
    yield harness
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def start(harness: Harness) -> "asyncio.Task[None]":
    return asyncio.create_task(harness.leader.run(lambda: None))


async def test_nothing_is_reconciled_before_the_first_full_list(harness: Harness) -> None:
    harness.api.failures = 3
    harness.leader.queue.add(("team", "early"))
    task = start(harness)
    while harness.api.failures:
        assert harness.reconciled == []
        await asyncio.sleep(0.005)
    await harness.until(lambda: KEY in harness.reconciled)
    assert harness.api.lists == 1
    assert not task.done()


async def test_a_broken_watch_is_followed_by_a_list(harness: Harness) -> None:
    start(harness)
    await harness.until(lambda: KEY in harness.reconciled)
    for _ in range(5):
        harness.leader.shell.relisted()
    await harness.until(lambda: harness.api.lists == 2)
    await harness.until(lambda: harness.reconciled.count(KEY) == 2)
    await asyncio.sleep(0.1)
    assert harness.api.lists == 2, "several breaks share one list"


async def test_a_late_watch_is_doubted_for_a_while(harness: Harness) -> None:
    """A half-open watch shows nothing for up to 70 s: lists stand in, ever more rarely."""
    start(harness)
    await harness.until(lambda: KEY in harness.reconciled)
    before = harness.api.lists
    for _ in range(5):
        harness.leader.reconciler.late()
    await harness.until(lambda: harness.api.lists >= before + 3)
    assert harness.leader._resync_pause() > harness.leader.timing.relist_seconds


@pytest.mark.parametrize("error", [ValueError("defect"), None])
async def test_any_task_that_ends_ends_the_leader(
    harness: Harness, error: Exception | None
) -> None:
    async def end() -> None:
        if error is not None:
            raise error

    harness.leader.poller.run = end  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="poller") as caught:
        await asyncio.wait_for(start(harness), 5)
    assert caught.value.__cause__ is error


async def test_stop_lets_a_running_reconcile_finish_and_starts_no_other(harness: Harness) -> None:
    harness.finish.clear()
    task = start(harness)
    await harness.until(lambda: harness.reconciled)
    stop = asyncio.create_task(harness.leader.stop())
    await asyncio.sleep(0.05)
    harness.leader.queue.add(("team", "late"))
    assert not stop.done()
    harness.finish.set()
    await asyncio.wait_for(stop, 5)
    assert (harness.reconciled, harness.finished) == ([KEY], 1)
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(task, 5)


async def test_stop_waits_for_a_hanging_reconcile_only_so_long(harness: Harness) -> None:
    harness.finish.clear()
    task = start(harness)
    await harness.until(lambda: harness.reconciled)
    await asyncio.wait_for(harness.leader.stop(), 3)
    assert harness.finished == 0
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(task, 5)
