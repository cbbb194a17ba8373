"""Polling of workers against a fake worker that misbehaves in every bounded way."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tilefleet_operator import metrics
from tilefleet_operator.metrics import WorkerPoller, post_drain
from tilefleet_operator.observed import MissingStats, PodView, WorkerStats
from tilefleet_operator.pace import PollTarget
from tilefleet_operator.telemetry import Telemetry

KEY = ("ns", "fleet")
DOCUMENT: dict[str, Any] = {
    "version": 1,
    "model": "tiny",
    "revision": "r",
    "uptime_seconds": 10.0,
    "draining": False,
    "ready": True,
    "block_size": 16,
    "counters": {"arrivals": 3, "generated_tokens": 40, "steps": 5, "busy_seconds": 1.5},
    "gauges": {"running": 1, "waiting": 2},
    "steps": [],
    "startup": [{"phase": "import", "seconds": 1.0}],
    "device": {"kind": "cpu"},
}


class FakeWorker:
    """Answers /stats with ``handler`` and remembers what /drain was told."""

    def __init__(self) -> None:
        self.port = 0
        self.sent_bytes = 0
        self.drains: list[Any] = []
        self.handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.good

    async def good(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(DOCUMENT)

    async def stats(self, request: web.Request) -> web.StreamResponse:
        return await self.handler(request)

    async def drain(self, request: web.Request) -> web.StreamResponse:
        self.drains.append(await request.json())
        return web.json_response({"draining": True, "inflight": 1}, status=202)


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    fake = FakeWorker()
    app = web.Application()
    app.router.add_get("/stats", fake.stats)
    app.router.add_post("/drain", fake.drain)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.port = runner.addresses[0][1]
    yield fake
    await runner.cleanup()


class Harness:
    """A poller of one pod, with a clock that the test moves."""

    def __init__(self, port: int, ip: str = "127.0.0.1") -> None:
        self.now = 100.0
        self.pod = PodView(name="p", uid="u", namespace="ns", ip=ip, ready=True)
        self.targets = {KEY: PollTarget((self.pod,), urgent=True)}
        self.polled: list[tuple[str, str]] = []
        self.telemetry = Telemetry()
        self.poller = WorkerPoller(
            lambda: self.targets,
            self.polled.append,
            self.telemetry,
            port=port,
            clock=lambda: self.now,
            wall=lambda: self.now,
        )

    async def poll(self) -> WorkerStats | MissingStats:
        async with metrics._session() as session:
            await self.poller.poll(session)
        return self.poller.stats([self.pod])["u"]

    def failures(self, reason: str) -> float:
        labels = {"reason": reason}
        name = "tilefleet_operator_scrape_failures_total"
        return self.telemetry.registry.get_sample_value(name, labels) or 0.0


async def test_an_answer_becomes_stats_history_and_a_dirty_key(worker: FakeWorker) -> None:
    harness = Harness(worker.port)
    stats = await harness.poll()
    assert isinstance(stats, WorkerStats)
    assert (stats.counters.arrivals, stats.gauges.waiting) == (3, 2)
    assert harness.polled == [KEY]
    assert harness.poller.history(KEY).latest["u"].counters.generated_tokens == 40
    harness.poller.forget(KEY)
    assert harness.poller.history(KEY).frames == ()


async def refuse(worker: FakeWorker) -> tuple[Harness, MissingStats]:
    harness = Harness(worker.port)
    stats = await asyncio.wait_for(harness.poll(), 3)
    assert isinstance(stats, MissingStats), stats
    assert harness.polled == [KEY], "an absent answer is news, too"
    return harness, stats


async def test_a_huge_answer_is_cut_off(worker: FakeWorker) -> None:
    async def huge(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1600):  # 100 MiB
            await response.write(b" " * (1 << 16))
            worker.sent_bytes += 1 << 16
        return response

    worker.handler = huge
    harness, stats = await refuse(worker)
    assert "larger than 1048576 bytes" in stats.reason
    assert harness.failures("invalid") == 1
    await asyncio.sleep(0.2)
    assert worker.sent_bytes < 32 << 20


async def test_a_slow_answer_is_cut_off(worker: FakeWorker) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(50):
            await response.write(b" ")
            await asyncio.sleep(0.1)
        return response

    worker.handler = slow
    harness, _ = await refuse(worker)
    assert harness.failures("unreachable") == 1


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[1]",
        "{}",
        json.dumps({**DOCUMENT, "version": 2}),
        json.dumps({**DOCUMENT, "uptime_seconds": float("nan")}),
        json.dumps(DOCUMENT).replace("10.0", "1e999"),
        json.dumps(DOCUMENT).replace("10.0", "9" * 5000),
        json.dumps({**DOCUMENT, "counters": {"arrivals": -1}}),
        json.dumps({**DOCUMENT, "counters": {"arrivals": "3"}}),
        "[" * 200_000,
        '{"version": 1, "model": ' + "[" * 100_000,
    ],
    ids=lambda text: text[:24],
)
async def test_an_unusable_answer_is_an_absent_one(worker: FakeWorker, text: str) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text)

    worker.handler = handler
    harness, stats = await refuse(worker)
    assert harness.failures("invalid") == 1
    assert len(stats.reason) < 400


async def test_a_redirect_is_not_followed(worker: FakeWorker) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("http://169.254.169.254/")

    worker.handler = handler
    _, stats = await refuse(worker)
    assert "302" in stats.reason


async def test_a_compressed_answer_is_not_unpacked(worker: FakeWorker) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        body = gzip.compress(json.dumps(DOCUMENT).encode())
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    worker.handler = handler
    await refuse(worker)


async def test_a_closed_port_and_a_bad_address_are_absent_answers() -> None:
    for ip, reason in (("127.0.0.1", "unreachable"), ("evil.example", "invalid")):
        harness = Harness(9, ip)
        assert isinstance(await harness.poll(), MissingStats)
        assert harness.failures(reason) == 1


async def test_an_answer_stands_for_ten_seconds_and_then_the_replica_is_unknown(
    worker: FakeWorker,
) -> None:
    harness = Harness(worker.port)
    await harness.poll()

    async def broken(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    worker.handler = broken
    harness.now += 9
    stats = await harness.poll()
    assert isinstance(stats, WorkerStats)
    assert stats.age_seconds == 9
    assert harness.poller.history(KEY).latest == {}, "a gap, not a copy"
    harness.now += 2
    stats = await harness.poll()
    assert isinstance(stats, MissingStats)
    assert "500" in stats.reason


async def test_a_pod_that_is_no_target_any_more_is_forgotten(worker: FakeWorker) -> None:
    harness = Harness(worker.port)
    await harness.poll()
    harness.targets = {}
    assert isinstance(await harness.poll(), MissingStats)


async def test_one_silent_worker_does_not_delay_the_others(worker: FakeWorker) -> None:
    quiet = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.host.startswith("127.0.0.2"):
            await quiet.wait()
        return web.json_response(DOCUMENT)

    app = web.Application()
    app.router.add_get("/stats", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    harness = Harness(runner.addresses[0][1])
    silent = PodView(name="s", uid="s", namespace="ns", ip="127.0.0.2", ready=True)
    harness.targets[("ns", "slow")] = PollTarget((silent,), urgent=True)
    async with metrics._session() as session:
        poll = asyncio.create_task(harness.poller.poll(session))
        async with asyncio.timeout(1):
            while harness.polled != [KEY]:
                await asyncio.sleep(0.01)
        assert not poll.done()
        quiet.set()
        await poll
    await runner.cleanup()


async def test_a_fleet_of_fixed_size_is_asked_slowly_and_reported_while_its_load_moves(
    worker: FakeWorker,
) -> None:
    harness = Harness(worker.port)
    harness.targets = {KEY: PollTarget((harness.pod,), urgent=False)}
    arrivals = 3

    async def handler(_: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        counters = {**DOCUMENT["counters"], "arrivals": arrivals, "steps": asked}
        return web.json_response({**DOCUMENT, "counters": counters, "uptime_seconds": asked * 10.0})

    asked = 0
    worker.handler = handler
    for _ in range(6):  # 10 s
        stats = await harness.poll()
        assert isinstance(stats, WorkerStats), "an answer stands until after the next"
        harness.now += 2
    assert asked == 2
    for _ in range(60):  # two minutes more
        await harness.poll()
        harness.now += 2
    assert asked == 13 + 1
    reported = len(harness.polled)
    assert reported <= 10, "a load that has not moved for 90 s is no news"
    arrivals += 1
    harness.now += 10
    await harness.poll()
    assert len(harness.polled) == reported + 1


async def test_a_new_replica_of_a_fixed_fleet_is_asked_at_once(worker: FakeWorker) -> None:
    harness = Harness(worker.port)
    harness.targets = {KEY: PollTarget((harness.pod,), urgent=False)}
    await harness.poll()
    other = PodView(name="q", uid="v", namespace="ns", ip="127.0.0.1", ready=True)
    harness.targets = {KEY: PollTarget((harness.pod, other), urgent=False)}
    await harness.poll()
    assert isinstance(harness.poller.stats([other])["v"], WorkerStats)


async def test_a_silent_worker_is_left_alone_longer_and_longer(worker: FakeWorker) -> None:
    harness = Harness(worker.port)

    async def broken(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    worker.handler = broken
    asked_at = []
    for _ in range(300):
        before = harness.failures("invalid")
        await harness.poll()
        if harness.failures("invalid") > before:
            asked_at.append(harness.now - 100)
        harness.now += 1
    assert asked_at == [0, 4, 12, 28, 60, 120, 180, 240]
    assert harness.polled == [KEY] * 300, "the fleet is looked at all the same"
    worker.handler = worker.good
    harness.now += 60
    assert isinstance(await harness.poll(), WorkerStats)
    worker.handler = broken
    await harness.poll()
    harness.now += 4
    before = harness.failures("invalid")
    await harness.poll()
    assert harness.failures("invalid") == before + 1, "an answer ends the silence"


async def test_drain_is_posted(worker: FakeWorker) -> None:
    await post_drain("127.0.0.1", worker.port, 30.0)
    assert worker.drains == [{"timeout_seconds": 30.0}]


async def test_a_drain_that_nobody_hears_raises_nothing() -> None:
    await post_drain("127.0.0.1", 9, 30.0)
    await post_drain("not an address", 9, 30.0)


async def test_ipv6_addresses_are_bracketed() -> None:
    assert metrics._url("fd00::1", 8001, "/stats") == "http://[fd00::1]:8001/stats"


async def test_sessions_follow_no_proxy_of_the_environment() -> None:
    async with metrics._session() as session:
        assert isinstance(session, aiohttp.ClientSession)
        assert not session.trust_env
