"""The fault proxy between operators and a real API server.

A fake for fault injection, and nothing else of the cluster is fake to it: what it forwards, it
forwards unchanged. It counts the mutating requests in each namespace, does something bad at a given
one, and knows from the Leases that pass through it who may write at any moment.
"""

import asyncio
import json
import os
import re
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

Json = dict[str, Any]

MUTATING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
RETRY_AFTER_SECONDS = 2
_PLACE = re.compile(r"/apis?/(?:[^/]+/)?v[^/]+/(?:namespaces/([^/]+)/)?([^/]+)(?:/([^/]+))?")

# What the proxy does at the n-th write of a namespace.
ANSWERS = {"409": "Conflict", "410": "Expired", "429": "TooManyRequests", "500": "InternalError"}
CUTS = ("reset before", "reset after", "no answer")
WATCHES = ("watch 410", "watch dropped", "watch half-open", "stale list")
PROCESS = ("kill before", "kill after", "stopped", "clock +1 h", "clock -1 h")
RESTART = "API server restart"


@dataclass(eq=False)
class Candidate:
    """One operator process as the proxy knows it: by the port that it alone was given."""

    name: str
    set_clock: Callable[[float], None] | None = None
    pid: int = 0
    """0 before its start and after its end: no other process is ever signalled in its place."""

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process lives."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass
class Script:
    """What happens to one namespace: the fault, when, and what was seen."""

    fault: str = ""
    at: int = 0
    """The number of the write at which it comes, over the whole life from 1; 0 for none."""
    writes: list[str] = field(default_factory=list)
    fired: str = ""
    """The write at which the fault came, "" before."""
    struck: asyncio.Event = field(default_factory=asyncio.Event)
    victim: Candidate | None = None
    stale: set[str] = field(default_factory=set)
    """Paths whose next list is an old one."""
    impatient: list[str] = field(default_factory=list)
    """Writes repeated before the Retry-After of their 429 had passed."""
    patience: dict[str, float] = field(default_factory=dict)
    early_lists: dict[str, bytes] = field(default_factory=dict)
    trespasses: list[str] = field(default_factory=list)
    """Writes of processes that did not hold the Lease when they came."""


@dataclass
class _Held:
    """The record of one Lease as the API server acknowledged it last."""

    candidate: Candidate
    identity: str
    until: float


@dataclass(eq=False)
class _Watch:
    """One open watch of a process."""

    namespace: str
    frozen: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False


class FaultProxy:
    """Forwards everything to one API server. Use ``running`` to start it."""

    def __init__(self, server: str, context: ssl.SSLContext) -> None:
        self.server, self.context = server, context
        self.scripts: dict[str, Script] = {}
        self.restart: Callable[[], None] = lambda: None
        """Begins to kill the API server and start it anew, if that is not under way."""
        self.requests = 0
        self._leases: dict[tuple[str, str], _Held] = {}
        self._groups: dict[Candidate, tuple[str, str]] = {}
        self._watches: set[_Watch] = set()
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    @asynccontextmanager
    async def running(cls, server: str, context: ssl.SSLContext) -> AsyncIterator["FaultProxy"]:
        """A proxy with open connections."""
        proxy = cls(server, context)
        connector = aiohttp.TCPConnector(limit=0, ssl=context)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False
        ) as session:
            proxy._session = session
            yield proxy

    async def listen(self, candidate: Callable[[], Candidate]) -> tuple[int, web.ServerRunner]:
        """A port for one operator; ``candidate`` names the process that uses it now."""

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            try:
                return await self._handle(request, candidate())
            except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionResetError(str(error)) from error

        runner = web.ServerRunner(
            web.Server(handle, access_log=None, logger=_Silent()), shutdown_timeout=0.1
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][1], runner

    def holder(self, lease: str) -> Candidate | None:
        """Who holds the Lease of this name."""
        held = [held for (_, name), held in self._leases.items() if name == lease]
        return held[0].candidate if held else None

    def script(self, namespace: str) -> Script:
        """The script of a namespace; an empty one when nobody gave it one."""
        return self.scripts.setdefault(namespace, Script())

    async def _handle(self, request: web.BaseRequest, who: Candidate) -> web.StreamResponse:
        self.requests += 1
        found = _PLACE.match(request.path)
        namespace, plural = (found[1] or "", found[2]) if found else ("", "")
        if plural == "leases":
            return await self._lease(request, who, namespace)
        if request.method in MUTATING:
            return await self._write(request, who, namespace)
        if "watch" in request.query:
            return await self._watch(request, namespace)
        return await self._read(request, namespace, found is not None and found[3] is None)

    async def _forward(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        async with self._open(request, body) as answer:
            headers = {
                key: value
                for key, value in answer.headers.items()
                if key in ("Content-Type", "Retry-After", "Content-Encoding")
            }
            return web.Response(status=answer.status, headers=headers, body=await answer.read())

    def _open(self, request: web.BaseRequest, body: bytes | None) -> Any:
        if self._session is None:
            raise RuntimeError("the proxy is not running")
        kept = ("Authorization", "Content-Type", "Accept", "Accept-Encoding")
        headers = {key: request.headers[key] for key in kept if key in request.headers}
        return self._session.request(
            request.method, self.server + request.path_qs, data=body or None, headers=headers
        )

    async def _lease(
        self, request: web.BaseRequest, who: Candidate, namespace: str
    ) -> web.StreamResponse:
        body = await request.read()
        answer = await self._forward(request)
        if request.method in MUTATING and answer.status < 300:
            document = json.loads(body)
            spec, place = document["spec"], (namespace, document["metadata"]["name"])
            self._groups[who] = place
            if spec["holderIdentity"]:
                until = time.monotonic() + spec["leaseDurationSeconds"]
                self._leases[place] = _Held(who, spec["holderIdentity"], until)
            else:
                self._leases.pop(place, None)
        return answer

    def _judge(self, request: web.BaseRequest, who: Candidate, script: Script) -> None:
        """Note a write of a process that does not hold its Lease now."""
        place = self._groups.get(who)
        held = self._leases.get(place) if place else None
        what = f"{who.name} {request.method} {request.path}"
        if held is None or held.candidate is not who:
            script.trespasses.append(f"{what}: the Lease is {held.identity if held else 'free'}")
        elif time.monotonic() > held.until:
            late = time.monotonic() - held.until
            script.trespasses.append(f"{what}: its Lease ended {late:.2f} s ago")

    async def _write(
        self, request: web.BaseRequest, who: Candidate, namespace: str
    ) -> web.StreamResponse:
        script = self.script(namespace)
        self._judge(request, who, script)
        what = f"{request.method} {request.path}"
        script.writes.append(what)
        if time.monotonic() < script.patience.pop(what, 0.0):
            script.impatient.append(what)
        if not script.fault or script.fired or len(script.writes) != script.at:
            try:
                return await self._forward(request)
            except (aiohttp.ClientError, ConnectionError):
                script.writes.pop()  # the server was away: the same write comes again
                raise
        script.fired, script.victim = what, who
        try:
            return await self._strike(request, who, namespace, script)
        finally:
            script.struck.set()

    async def _strike(
        self, request: web.BaseRequest, who: Candidate, namespace: str, script: Script
    ) -> web.StreamResponse:
        fault = script.fault
        if fault in ANSWERS:
            if fault == "429":
                what = f"{request.method} {request.path}"
                script.patience[what] = time.monotonic() + RETRY_AFTER_SECONDS
            await request.read()
            return _refusal(int(fault), ANSWERS[fault])
        if fault not in CUTS and not fault.startswith("kill"):
            self._befall(namespace, fault, who)
            return await self._forward(request)
        if fault not in ("kill before", "reset before"):
            await self._forward(request)
        if fault.startswith("kill"):
            self._befall(namespace, fault, who)
        if fault == "no answer":
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.05)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(fault)

    def strike(self, namespace: str, who: Candidate) -> None:
        """Do now what does not need a request; ``who`` is the leader."""
        script = self.script(namespace)
        script.fired, script.victim = "no write", who
        self._befall(namespace, script.fault, who)
        script.struck.set()

    def _befall(self, namespace: str, fault: str, who: Candidate) -> None:
        """What happens to processes, watches and the server, beside the request."""
        if fault.startswith("kill"):
            who.send(signal.SIGKILL)
        elif fault == "stopped":
            who.send(signal.SIGSTOP)
        elif fault.startswith("clock") and who.set_clock is not None:
            who.set_clock(3600.0 if "+" in fault else -3600.0)
        elif fault in WATCHES:
            self._break_watches(namespace, fault)
        elif fault == RESTART:
            self.restart()

    def _break_watches(self, namespace: str, fault: str) -> None:
        for watch in [one for one in self._watches if one.namespace == namespace]:
            if fault == "watch half-open":
                watch.frozen = True
            else:
                watch.gone = fault != "watch dropped"
                watch.ended.set()
        if fault == "stale list":
            script = self.script(namespace)
            script.stale = set(script.early_lists)

    async def _read(
        self, request: web.BaseRequest, namespace: str, is_list: bool
    ) -> web.StreamResponse:
        script = self.script(namespace)
        place = _place(request)
        if place in script.stale:
            script.stale.discard(place)
            return web.Response(
                body=script.early_lists[place], headers={"Content-Type": "application/json"}
            )
        answer = await self._forward(request)
        if is_list and namespace and answer.status == 200 and isinstance(answer.body, bytes):
            script.early_lists.setdefault(place, answer.body)
        return answer

    async def _watch(self, request: web.BaseRequest, namespace: str) -> web.StreamResponse:
        watch = _Watch(namespace)
        self._watches.add(watch)
        try:
            async with self._open(request, None) as answer:
                if answer.status != 200:
                    return web.Response(status=answer.status, body=await answer.read())
                response = web.StreamResponse(headers={"Content-Type": "application/json"})
                await response.prepare(request)
                await self._stream(request, answer, response, watch)
                return response
        finally:
            self._watches.discard(watch)

    async def _stream(
        self, request: web.BaseRequest, answer: Any, response: web.StreamResponse, watch: _Watch
    ) -> None:
        """Pass whole lines on until one side ends, or the watch is told to break."""
        ended = asyncio.create_task(watch.ended.wait())
        chunks, rest = answer.content.iter_any(), b""
        try:
            pending = asyncio.ensure_future(anext(chunks, b""))
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.wait(
                    (ended, pending), timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                )
                if watch.ended.is_set():
                    break
                if not pending.done():
                    continue
                chunk = pending.result()
                if not chunk:
                    return
                pending = asyncio.ensure_future(anext(chunks, b""))
                lines, mark, rest = (rest + chunk).rpartition(b"\n")
                if mark and not watch.frozen:
                    await response.write(lines + mark)
            if watch.gone and request.transport is not None:
                status = _status(410, "Expired")
                await response.write(
                    json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"
                )
                return
            if request.transport is not None:
                request.transport.abort()
        finally:
            for task in (ended, pending):
                task.cancel()
                with suppress(asyncio.CancelledError, aiohttp.ClientError):
                    await task


def _place(request: web.BaseRequest) -> str:
    """A list's path with its selectors, without the paging that differs between our clients."""
    selector = request.query.get("labelSelector", "")
    return f"{request.path}?{selector}"


def _status(code: int, reason: str) -> Json:
    return {
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason,
        "message": f"injected {reason}", "metadata": {},
    }  # fmt: skip


def _refusal(code: int, reason: str) -> web.Response:
    headers = {"Content-Type": "application/json"}
    if code == 429:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return web.Response(status=code, body=json.dumps(_status(code, reason)), headers=headers)


class _Silent:
    """A server's log for connections that are broken on purpose."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None
