"""What the judge of a fault sweep sees: the API server's own watches, with no proxy between."""

import asyncio
import contextlib
import json
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp

Json = dict[str, Any]

FLEETS = "/apis/tilefleet.io/v1alpha1"
PATHS = {"pods": "/api/v1", "services": "/api/v1", "inferencedeployments": FLEETS}
_KINDS = {"PATCH": "application/merge-patch+json"}


class Admin:
    """Requests as the cluster's administrator; a server that restarts is waited for."""

    def __init__(self, url: str, token: str, context: ssl.SSLContext) -> None:
        self.url, self.token, self.context = url, token, context
        self.session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Admin":
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self.context),
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.session is not None
        await self.session.close()

    async def send(self, method: str, path: str, body: Json | None = None) -> Json:
        """One request; {} for an answer of 404 or 409, which a rival's action explains."""
        assert self.session is not None
        kind = _KINDS.get(method, "application/json")
        data = None if body is None else json.dumps(body)
        for attempt in range(120):
            try:
                async with self.session.request(
                    method, self.url + path, data=data, headers={"Content-Type": kind}
                ) as answer:
                    text = await answer.text()
                    if answer.status in (404, 409):
                        return {}
                    if answer.status < 300:
                        found: Json = json.loads(text)
                        return found
                    if answer.status not in (401, 403, 429, 500, 503, 504) or attempt > 100:
                        raise AssertionError(f"{method} {path}: {answer.status} {text[:500]}")
            except (aiohttp.ClientError, ConnectionError):
                pass
            await asyncio.sleep(0.25)
        raise AssertionError(f"{method} {path}: the API server does not answer")


class ClusterView:
    """Newest version of each object by UID, and what was ever seen of the pods."""

    def __init__(self, admin: Admin) -> None:
        self.admin = admin
        self.objects: dict[str, dict[str, Json]] = {plural: {} for plural in PATHS}
        self.listeners: list[Callable[[str, str, Json], None]] = []
        self._changed: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._queues: list[tuple[str, asyncio.Queue[Json]]] = []
        self.synced = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        await asyncio.gather(*(self._follow(plural) for plural in PATHS))

    def touch(self, uid: str) -> None:
        """Wake who waits for this object."""
        self._changed[uid].set()

    async def changed(self, uid: str) -> None:
        """Until something happened to this object since the last call, or for half a second."""
        event = self._changed[uid]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), 0.5)
        event.clear()

    async def stream(self, plural: str) -> AsyncIterator[Json]:
        """Every new or changed object of a resource from now on."""
        queue: asyncio.Queue[Json] = asyncio.Queue()
        self._queues.append((plural, queue))
        for body in list(self.objects[plural].values()):
            queue.put_nowait(body)
        while True:
            yield await queue.get()

    def of(self, plural: str, namespace: str) -> list[Json]:
        """Objects in a namespace, by name."""
        found = [
            one for one in self.objects[plural].values()
            if one["metadata"]["namespace"] == namespace
        ]  # fmt: skip
        return sorted(found, key=lambda one: str(one["metadata"]["name"]))

    async def _follow(self, plural: str) -> None:
        path = f"{PATHS[plural]}/{plural}"
        version = (await self.admin.send("GET", path))["metadata"]["resourceVersion"]
        while True:
            try:
                version = await self._watch(plural, path, version)
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                await asyncio.sleep(0.2)

    async def _watch(self, plural: str, path: str, version: str) -> str:
        session = self.admin.session
        assert session is not None
        query = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true"}
        async with session.get(self.admin.url + path, params=query) as answer:
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if "metadata" not in event["object"] or event["type"] == "ERROR":
                        if event["object"].get("code") == 410:
                            raise AssertionError("the judge's own watch lost events")
                        continue
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        self._take(plural, event["type"], event["object"])
        return version

    def _take(self, plural: str, kind: str, body: Json) -> None:
        uid = body["metadata"]["uid"]
        if kind == "DELETED":
            self.objects[plural].pop(uid, None)
        else:
            self.objects[plural][uid] = body
        for listener in self.listeners:
            listener(plural, kind, body)
        self.touch(uid)
        for wanted, queue in self._queues:
            if wanted == plural and kind != "DELETED":
                queue.put_nowait(body)
