"""What the judge of a fault sweep sees: the API server's own watches, with no proxy between."""

import asyncio
import contextlib
import json
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp

Json = dict[str, Any]

FLEETS = "/apis/tilefleet.io/v1alpha1"
PATHS = {"pods": "/api/v1", "services": "/api/v1", "inferencedeployments": FLEETS}
PATIENCE_SECONDS = 300.0
_KINDS = {"PATCH": "application/merge-patch+json"}


class _Gone(Exception):
    """The server keeps no events since this version."""


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
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
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
                    if answer.status not in (401, 403, 429, 500, 503, 504):
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
        self._places: dict[tuple[str, str], dict[str, Json]] = defaultdict(dict)
        self._versions: dict[str, str] = {}
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
        found = self._places[plural, namespace].values()
        return sorted(found, key=lambda one: str(one["metadata"]["name"]))

    async def _follow(self, plural: str) -> None:
        path = f"{PATHS[plural]}/{plural}"
        await self._list(plural, path)
        while True:
            try:
                await self._watch(plural, path)
            except _Gone:
                await self._list(plural, path)
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                await asyncio.sleep(0.2)

    async def _list(self, plural: str, path: str) -> None:
        """Take a whole list; a server that was started anew keeps no events of before."""
        listed = await self.admin.send("GET", path)
        self._versions[plural] = listed["metadata"]["resourceVersion"]
        # The items do not say what they are; those of a watch do.
        what = {"apiVersion": listed["apiVersion"], "kind": listed["kind"].removesuffix("List")}
        there = {one["metadata"]["uid"]: what | one for one in listed["items"]}
        for uid, body in list(self.objects[plural].items()):
            if uid not in there:
                self._take(plural, "DELETED", body)
        for uid, body in there.items():
            known = self.objects[plural].get(uid)
            if known is None:
                self._take(plural, "ADDED", body)
            elif known["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
                self._take(plural, "MODIFIED", body)

    async def _watch(self, plural: str, path: str) -> None:
        session = self.admin.session
        assert session is not None
        query = {"watch": "1", "allowWatchBookmarks": "true"}
        query["resourceVersion"] = self._versions[plural]
        async with session.get(self.admin.url + path, params=query) as answer:
            if answer.status == 410:
                raise _Gone
            answer.raise_for_status()
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if "metadata" not in event["object"] or event["type"] == "ERROR":
                        if event["object"].get("code") == 410:
                            raise _Gone
                        continue
                    self._versions[plural] = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        self._take(plural, event["type"], event["object"])

    def _take(self, plural: str, kind: str, body: Json) -> None:
        uid, place = body["metadata"]["uid"], (plural, body["metadata"].get("namespace", ""))
        if kind == "DELETED":
            self.objects[plural].pop(uid, None)
            self._places[place].pop(uid, None)
        else:
            self.objects[plural][uid] = self._places[place][uid] = body
        for listener in self.listeners:
            listener(plural, kind, body)
        self.touch(uid)
        for wanted, queue in self._queues:
            if wanted == plural and kind != "DELETED":
                queue.put_nowait(body)
