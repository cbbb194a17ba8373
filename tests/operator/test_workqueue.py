"""The work queue, in virtual time."""

import asyncio
import random

import pytest

from tests.operator.builders import Clock
from tilefleet_operator.workqueue import QueueClosed, QueueLimits, WorkQueue

A, B = ("ns", "a"), ("ns", "b")


@pytest.fixture
def clock() -> Clock:
    return Clock(now=100.0)


@pytest.fixture
def queue(clock: Clock) -> WorkQueue:
    return WorkQueue(clock=clock, rand=lambda: 1.0)


async def take(queue: WorkQueue) -> tuple[str, str] | None:
    """The next key that is due now, None if there is none."""
    try:
        return (await asyncio.wait_for(queue.get(), 0.01))[0]
    except TimeoutError:
        return None


async def test_many_adds_are_one_run(queue: WorkQueue) -> None:
    for _ in range(10):
        queue.add(A)
    assert await take(queue) == A
    assert await take(queue) is None


async def test_a_running_key_is_handed_out_again_only_after_done(queue: WorkQueue) -> None:
    queue.add(A)
    assert await take(queue) == A
    queue.add(A)
    queue.add(A)
    assert await take(queue) is None
    queue.done(A)
    assert await take(queue) == A
    queue.done(A)
    assert await take(queue) is None


async def test_the_earliest_request_wins(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A, 60)
    queue.add(A, 5)
    queue.add(A, 30)
    assert await take(queue) is None
    clock.now += 5
    assert await take(queue) == A
    queue.done(A)
    clock.now += 100
    assert await take(queue) is None


async def test_backoff_doubles_and_success_resets_it(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A)
    for delay in (0.05, 0.1, 0.2, 0.4):
        assert await take(queue) == A
        queue.done(A, failed=True)
        clock.now += delay * 0.99
        assert await take(queue) is None
        clock.now += delay * 0.02
    assert await take(queue) == A
    queue.done(A)
    queue.add(A)
    assert await take(queue) == A
    queue.done(A, failed=True)
    clock.now += 0.051
    assert await take(queue) == A


async def test_the_api_servers_retry_after_outlasts_the_backoff(
    queue: WorkQueue, clock: Clock
) -> None:
    queue.add(A)
    assert await take(queue) == A
    queue.done(A, failed=True, retry_after_seconds=3.0)
    clock.now += 2.9
    assert await take(queue) is None
    clock.now += 0.2
    assert await take(queue) == A


async def test_events_wake_a_failing_key_late_but_before_its_backoff(
    queue: WorkQueue, clock: Clock
) -> None:
    """A refused write that provokes an event each time must not become a hot loop."""
    queue.add(A)
    for _ in range(12):
        clock.now += 400
        assert await take(queue) == A
        queue.done(A, failed=True)
    queue.add(A)
    clock.now += 4.9
    assert await take(queue) is None
    clock.now += 0.2
    assert await take(queue) == A


async def test_keys_that_failed_together_come_back_apart(clock: Clock) -> None:
    """Full jitter: anywhere from the first backoff to the whole one."""
    shares = iter([0.0, 0.25, 1.0])
    queue = WorkQueue(QueueLimits(base_seconds=1.0), clock=clock, rand=lambda: next(shares))
    for wait in (1.0, 1.0, 4.0):  # of 1, 2 and 4 seconds
        queue.add(A)
        clock.now += 300
        assert await take(queue) == A
        queue.done(A, failed=True)
        clock.now += wait - 0.01
        assert await take(queue) is None
        clock.now += 0.02
        assert await take(queue) == A
        del queue._running[A]


async def test_superseded_requests_take_no_memory(queue: WorkQueue, clock: Clock) -> None:
    for _ in range(1000):
        queue.add(A)
        assert await take(queue) == A
        queue.done(A, requeue_after_seconds=300.0)
    assert len(queue._heap) < 100


async def test_requeue_after(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A)
    assert await take(queue) == A
    queue.done(A, requeue_after_seconds=7)
    clock.now += 6.9
    assert await take(queue) is None
    clock.now += 0.2
    assert await take(queue) == A


async def test_the_token_bucket_limits_all_keys_together(clock: Clock) -> None:
    queue = WorkQueue(QueueLimits(keys_per_second=10, burst=3), clock=clock)
    for number in range(6):
        queue.add(("ns", str(number)))
    assert [await take(queue) is not None for _ in range(4)] == [True, True, True, False]
    clock.now += 0.21
    assert [await take(queue) is not None for _ in range(3)] == [True, True, False]


async def test_depth_and_age(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A)
    queue.add(B, 50)
    clock.now += 20
    assert (queue.depth(), queue.oldest_seconds()) == (1, 20)
    assert await take(queue) == A
    clock.now += 5
    assert (queue.depth(), queue.oldest_seconds()) == (0, 5)
    queue.done(A)
    assert queue.oldest_seconds() == 0


async def test_close_ends_every_waiting_get(queue: WorkQueue) -> None:
    waiting = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.close()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, QueueClosed) for result in results)
    queue.add(A)
    with pytest.raises(QueueClosed):
        await queue.get()


async def test_no_key_is_worked_on_twice_at_a_time_and_none_is_forgotten() -> None:
    """8 workers, 200 keys, random adds and failures: per key no overlap, the last add is served."""
    queue = WorkQueue(QueueLimits(keys_per_second=1e6, burst=10_000, base_seconds=0.001))
    chance = random.Random(7)
    active: set[tuple[str, str]] = set()
    wanted, served = dict.fromkeys((("ns", str(n)) for n in range(200)), 0), {}

    async def worker() -> None:
        while True:
            key, _ = await queue.get()
            assert key not in active
            active.add(key)
            version = wanted[key]
            await asyncio.sleep(0)
            active.discard(key)
            if chance.random() < 0.2:
                queue.done(key, failed=True)
            else:
                served[key] = version
                queue.done(key)

    workers = [asyncio.create_task(worker()) for _ in range(8)]
    for turn in range(1, 21):
        for key in wanted:
            wanted[key] = turn
            queue.add(key)
        await asyncio.sleep(0.001)
    async with asyncio.timeout(20):
        while served != wanted:
            assert not any(task.done() for task in workers)
            await asyncio.sleep(0.01)
    for task in workers:
        task.cancel()


async def test_an_urgent_key_does_not_wait_behind_a_thousand(
    queue: WorkQueue, clock: Clock
) -> None:
    for number in range(1000):
        queue.add(("ns", f"f{number:04d}"))
    clock.now += 4
    queue.add(A, urgent=True)
    assert await take(queue) == A


async def test_no_key_waits_for_ever_behind_urgent_ones(queue: WorkQueue, clock: Clock) -> None:
    """A user who changes specs without end holds the others up for the head start, not longer."""
    queue.add(B)
    waited = 0
    while True:
        queue.add(A, urgent=True)
        key = await take(queue)
        if key == B:
            break
        queue.done(A)
        clock.now += 1
        waited += 1
    assert waited == queue.limits.head_start_seconds + 1


async def test_urgency_outlasts_a_running_reconcile(queue: WorkQueue) -> None:
    queue.add(A)
    assert await take(queue) == A
    queue.add(B)
    queue.add(A, urgent=True)
    queue.done(A)
    assert await take(queue) == A


async def test_urgency_does_not_break_a_backoff(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A)
    assert await take(queue) == A
    queue.done(A, failed=True, retry_after_seconds=3)
    queue.add(A, urgent=True)
    queue.add(B)
    assert await take(queue) == B, "a key that is not due must not hide one that is"
    assert await take(queue) is None
    clock.now += 3
    assert await take(queue) == A
