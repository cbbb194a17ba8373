"""A small API server for tests of the kubectl plugin: real HTTP, objects in a dictionary.

It answers the requests that the plugin makes, and remembers its writes; what an API server refuses
for a missing permission can be switched on a path.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

Json = dict[str, Any]


class PluginCluster:
    """Objects by the path of their collection; logs and /stats by pod name."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Json]] = {}
        self.stats: dict[str, Json] = {}
        self.logs: dict[str, str] = {}
        self.forbidden: set[str] = set()
        self.writes: list[tuple[str, dict[str, str], Json]] = []
        self.queries: list[dict[str, str]] = []
        self.url = ""

    def put(self, collection: str, body: Json) -> None:
        """Add an object below, for example, /api/v1/pods."""
        self.objects.setdefault(collection, []).append(body)

    async def handle(self, request: web.Request) -> web.Response:
        where = request.path
        if any(part in where for part in self.forbidden):
            return _status(403, "Forbidden", f"user cannot get {where}")
        if where.endswith(":8001/proxy/stats"):
            return self._text(self.stats, where.split("/")[-3].removesuffix(":8001"))
        if where.endswith("/log"):
            self.queries.append(dict(request.query))
            return self._text(self.logs, where.split("/")[-2])
        if request.method == "PATCH":
            body = json.loads(await request.read())
            self.writes.append((where, dict(request.query), body))
            return web.json_response(body)
        return self._read(where, request.query.get("labelSelector", ""))

    def _text(self, found: dict[str, Any], pod: str) -> web.Response:
        if pod not in found:
            return _status(503, "ServiceUnavailable", "no endpoints")
        value = found[pod]
        return web.Response(text=value if isinstance(value, str) else json.dumps(value))

    def _read(self, where: str, selector: str) -> web.Response:
        parts = where.split("/")
        namespace = name = None
        if "namespaces" in parts:
            at = parts.index("namespaces")
            namespace = parts[at + 1]
            name = parts[at + 3] if len(parts) > at + 3 else None
            parts = [*parts[:at], parts[at + 2]]
        collection = "/".join(parts)
        if collection not in self.objects:
            return _status(404, "NotFound", "the server could not find the requested resource")
        key, _, value = selector.partition("=")
        found = [
            body
            for body in self.objects[collection]
            if namespace in (None, body["metadata"].get("namespace"))
            and name in (None, body["metadata"]["name"])
            and (not key or value in ("", body["metadata"].get("labels", {}).get(key)))
        ]
        if name is None:
            return web.json_response({"metadata": {"resourceVersion": "9"}, "items": found})
        if not found:
            return _status(404, "NotFound", f'inferencedeployments.tilefleet.io "{name}" not found')
        return web.json_response(found[0])


def _status(code: int, reason: str, message: str) -> web.Response:
    return web.json_response({"reason": reason, "message": message}, status=code)


@contextmanager
def serving(cluster: PluginCluster) -> Iterator[None]:
    """Serve the cluster from a thread, because commands run an event loop of their own."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", cluster.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        cluster.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def kubeconfig(cluster: PluginCluster, folder: Path, namespace: str) -> Path:
    """A kubeconfig whose current context has the namespace, and a second context without one."""
    file = folder / "kubeconfig"
    context = {"cluster": "c", "user": "u"}
    file.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": cluster.url}}],
                "users": [{"name": "u", "user": {"token": "secret"}}],
                "contexts": [
                    {"name": "team", "context": context | {"namespace": namespace}},
                    {"name": "plain", "context": context},
                ],
                "current-context": "team",
            }
        )
    )
    return file
