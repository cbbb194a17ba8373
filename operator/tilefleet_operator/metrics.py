"""Talks to workers: reads /stats of each needed pod, at the pace of pace.py, and posts /drain.

Whatever a worker answers is bounded in size, time and depth before it is believed. It owns the
history of each fleet. It does not know what the numbers are used for.
"""

import asyncio
import ipaddress
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import aiohttp

from tilefleet_operator.cache import Key
from tilefleet_operator.desired import ADMIN_PORT
from tilefleet_operator.errors import ObservationInvalid
from tilefleet_operator.observed import History, MissingStats, PodView, WorkerStats, worker_stats
from tilefleet_operator.pace import Pace, PollTarget
from tilefleet_operator.polls import CALM_POLL_SECONDS
from tilefleet_operator.telemetry import Telemetry

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
TIMEOUT_SECONDS = 1.5
SIZE_LIMIT_BYTES = 1 << 20
CONCURRENCY = 64
KEPT_SECONDS = 10.0
"""An answer stands for its replica this long beyond the pace at which its fleet is asked; without a
newer one the replica is unknown."""
SETTLED_SECONDS = 90.0
"""So long after its last change the load of a fleet is still news: rates over 60 s fade out."""

Targets = Callable[[], Mapping[Key, PollTarget]]


class WorkerPoller:
    """Newest answers and histories of all polled fleets; use it as a long-lived task."""

    def __init__(
        self,
        targets: Targets,
        polled: Callable[[Key], None],
        telemetry: Telemetry,
        *,
        port: int = ADMIN_PORT,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """targets: what may be polled. polled: called for a key whose load a plan must look at."""
        self.targets, self.polled, self.telemetry, self.port = targets, polled, telemetry, port
        self.clock, self.wall = clock, wall
        self._pace = Pace(clock)
        self._answers: dict[str, tuple[float, float, WorkerStats]] = {}
        self._failures: dict[str, str] = {}
        self._histories: dict[Key, History] = {}
        self._moved: dict[Key, float] = {}
        self._limit = asyncio.Semaphore(CONCURRENCY)

    async def run(self) -> None:
        """Poll for ever."""
        async with _session() as session:
            while True:
                started = self.clock()
                await self.poll(session)
                await asyncio.sleep(max(0.1, POLL_SECONDS - (self.clock() - started)))

    async def poll(self, session: aiohttp.ClientSession) -> None:
        """One round over all targets; keys are reported as they complete."""
        targets = self.targets()
        alive = {pod.uid for target in targets.values() for pod in target.pods}
        for held in (self._answers, self._failures):
            for uid in held.keys() - alive:
                del held[uid]
        self._pace.forget(targets.keys(), alive)
        due = {key: one for key, one in targets.items() if self._pace.is_due(key, one)}
        await asyncio.gather(*(self._poll_key(session, key, one) for key, one in due.items()))

    def stats(self, pods: Sequence[PodView]) -> dict[str, WorkerStats | MissingStats]:
        """Pod UID → newest answer with its age, or why there is none."""
        return {pod.uid: self._newest(pod.uid) for pod in pods}

    def history(self, key: Key) -> History:
        """The polls of one fleet since this process leads."""
        return self._histories.get(key, History())

    def forget(self, key: Key) -> None:
        """Drop the history of a deployment that is gone."""
        self._histories.pop(key, None)
        self._moved.pop(key, None)

    async def _poll_key(self, session: aiohttp.ClientSession, key: Key, target: PollTarget) -> None:
        round_: dict[str, WorkerStats | MissingStats] = {
            pod.uid: MissingStats(self._failures.get(pod.uid, "not polled yet"))
            for pod in target.pods
        }
        awake = self._pace.awake(target.pods)
        kept = KEPT_SECONDS + (0.0 if target.urgent else CALM_POLL_SECONDS)
        answers = await asyncio.gather(*(self._ask(session, pod, kept) for pod in awake))
        round_.update(zip((pod.uid for pod in awake), answers, strict=True))
        before = self.history(key)
        self._histories[key] = after = before.add(self.wall(), round_)
        if not before.frames or _load(before) != _load(after):
            self._moved[key] = self.clock()
        if target.urgent or self.clock() - self._moved[key] < SETTLED_SECONDS:
            self.polled(key)

    async def _ask(
        self, session: aiohttp.ClientSession, pod: PodView, kept: float
    ) -> WorkerStats | MissingStats:
        try:
            async with self._limit:
                stats = worker_stats(await read_stats(session, _url(pod.ip, self.port, "/stats")))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return self._missed(pod, "unreachable", f"no /stats answer: {_text(error)}")
        except (ObservationInvalid, ValueError, RecursionError) as error:
            return self._missed(pod, "invalid", f"unusable /stats answer: {_text(error)}")
        self._answers[pod.uid] = (self.clock(), kept, stats)
        self._failures.pop(pod.uid, None)
        self._pace.answered(pod.uid)
        return stats

    def _missed(self, pod: PodView, reason: str, message: str) -> MissingStats:
        self.telemetry.scrape_failures.labels(reason).inc()
        if pod.uid not in self._failures:
            logger.warning("pod %s/%s: %s", pod.namespace, pod.name, message)
        self._failures[pod.uid] = message
        self._pace.silent(pod.uid)
        return MissingStats(message)

    def _newest(self, uid: str) -> WorkerStats | MissingStats:
        held = self._answers.get(uid)
        age = math.inf if held is None else self.clock() - held[0]
        if held is None or age > held[1]:
            return MissingStats(self._failures.get(uid, "not polled yet"))
        return replace(held[2], age_seconds=age)


def _load(history: History) -> Mapping[str, object]:
    """What a plan reads of the newest answers, without what moves while nothing happens."""
    return {
        uid: (replace(sample.counters, steps=0, busy_seconds=0.0), sample.gauges, sample.draining)
        for uid, sample in history.latest.items()
    }


async def read_stats(session: aiohttp.ClientSession, url: str) -> Mapping[str, Any]:
    """One /stats document within the limits of time and size.

    Raises ObservationInvalid for another status than 200, a larger body, or what is no JSON object
    of finite numbers; aiohttp.ClientError and TimeoutError for the transport.
    """
    body = bytearray()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        async with session.get(url, allow_redirects=False, headers=headers) as response:
            if response.status != 200:
                raise ObservationInvalid(f"HTTP status {response.status} is not 200")
            async for chunk in response.content.iter_chunked(1 << 16):
                body += chunk
                if len(body) > SIZE_LIMIT_BYTES:
                    raise ObservationInvalid(f"body is larger than {SIZE_LIMIT_BYTES} bytes")
    document = json.loads(body, parse_constant=_refuse, parse_float=_finite)
    if not isinstance(document, dict):
        raise ObservationInvalid(f"a JSON {type(document).__name__} is not an object")
    return document


async def post_drain(ip: str, port: int, timeout_seconds: float) -> None:
    """Ask one worker to finish. A failure is logged; a later plan asks again."""
    try:
        async with _session() as session, asyncio.timeout(TIMEOUT_SECONDS):
            url = _url(ip, port, "/drain")
            body = {"timeout_seconds": timeout_seconds}
            async with session.post(url, json=body, allow_redirects=False) as response:
                if response.status >= 300:
                    logger.warning("drain of %s: HTTP status %d", ip, response.status)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        logger.warning("drain of %s: %s", ip, _text(error))


def _session() -> aiohttp.ClientSession:
    # A worker never sends compressed data on purpose; not unpacking leaves no room for a bomb.
    connector = aiohttp.TCPConnector(limit=CONCURRENCY)
    return aiohttp.ClientSession(connector=connector, auto_decompress=False, trust_env=False)


def _url(ip: str | None, port: int, path: str) -> str:
    """URL on a pod. Raises ValueError when the API server's podIP is no address."""
    address = ipaddress.ip_address(ip or "")
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"http://{host}:{port}{path}"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:32]} is not a finite number")
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _text(error: BaseException) -> str:
    """What a worker's failure may put into a log or a status: short, and never empty."""
    return (str(error) or type(error).__name__)[:256]
