"""A fake kubelet for many namespaces: binds pods, reports them ready, answers as their workers.

Fake, and named so. It sees what the real one would (its own watch, straight from the API server),
so no fault of the proxy reaches it.
"""

import asyncio
import os
import time
from typing import Any

from aiohttp import web

from tests.faults.view import Admin, ClusterView, Json

ADMIN_PORT = 8001
READY_SECONDS = 0.15


class FakeKubelet:
    """Tends every pod that the view shows."""

    def __init__(self, admin: Admin, view: ClusterView) -> None:
        self.admin, self.view = admin, view
        self._ips: dict[str, str] = {}
        self._drained: set[str] = set()
        self._sites: dict[str, web.BaseSite] = {}
        self._number = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        app = web.Application()
        app.add_routes([web.get("/stats", self._stats), web.post("/drain", self._drain)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def run(self) -> None:
        """Until cancelled."""
        await self._runner.setup()
        try:
            async for pod in self.view.stream("pods"):
                uid = pod["metadata"]["uid"]
                if uid not in self._tasks:
                    self._tasks[uid] = asyncio.create_task(self._tend(uid, pod))
                for done in [key for key, task in self._tasks.items() if task.done()]:
                    self._tasks.pop(done).result()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await self._runner.cleanup()

    async def _tend(self, uid: str, pod: Json | None) -> None:
        """One pod from its creation to its end."""
        if pod is None or uid not in self.view.objects["pods"]:
            return
        metadata = pod["metadata"]
        where = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        binding = {"metadata": {"name": metadata["name"]}, "target": {"name": "fake-node"}}
        if not pod["spec"].get("nodeName"):
            await self.admin.send("POST", f"{where}/binding", binding)
        ip = await self._serve(uid)
        await asyncio.sleep(READY_SECONDS)
        ready: bool | None = None
        while (pod := self.view.objects["pods"].get(uid)) is not None:
            if "deletionTimestamp" in pod["metadata"]:
                await self.admin.send("DELETE", where, {"gracePeriodSeconds": 0})
            elif ready is not (uid not in self._drained):
                ready = uid not in self._drained
                await self._report(where, ready, ip)
            await self.view.changed(uid)
        await self._sites.pop(uid).stop()
        self._ips.pop(ip)

    async def _serve(self, uid: str) -> str:
        """An address on the loopback on which this pod's worker answers."""
        self._number += 1
        # One prefix a process: several suites may run on one machine.
        ip = f"127.{120 + os.getpid() % 100}.{self._number // 250 % 250}.{self._number % 250 + 1}"
        self._sites[uid] = web.TCPSite(self._runner, ip, ADMIN_PORT)
        await self._sites[uid].start()
        self._ips[ip] = uid
        return ip

    async def _report(self, where: str, ready: bool, ip: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        conditions = [
            {"type": kind, "status": "True" if ready or not kind.endswith("Ready") else "False",
             "lastTransitionTime": now}
            for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]  # fmt: skip
        status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}
        await self.admin.send("PATCH", f"{where}/status", {"status": status})

    def _uid(self, request: web.Request) -> str:
        assert request.transport is not None
        return self._ips.get(request.transport.get_extra_info("sockname")[0], "")

    async def _stats(self, request: web.Request) -> web.Response:
        drained = self._uid(request) in self._drained
        counters = dict.fromkeys(
            ("arrivals", "generated_tokens", "prompt_tokens_computed", "steps", "busy_seconds",
             "completions"), 0,
        )  # fmt: skip
        document: Json = {
            "version": 1, "model": "tiny", "revision": "r", "uptime_seconds": 100.0,
            "draining": drained, "ready": not drained, "block_size": 16, "counters": counters,
            "gauges": {"running": 0, "waiting": 0, "max_concurrent": 256},
            "steps": [], "startup": [], "device": {"kind": "cpu"},
        }  # fmt: skip
        return web.json_response(document)

    async def _drain(self, request: web.Request) -> web.Response:
        uid = self._uid(request)
        self._drained.add(uid)
        self.view.touch(uid)
        body: dict[str, Any] = {"draining": True, "inflight": 0}
        return web.json_response(body, status=202)
