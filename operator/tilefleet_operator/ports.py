"""The operator's HTTP ports: /metrics, /healthz and /readyz.

It does not know what is healthy: it asks the functions it is given.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from tilefleet_operator.telemetry import Telemetry

Check = Callable[[], Sequence[str]]
"""Returns what is wrong, one sentence each; empty when all is well."""


async def serve_metrics(
    telemetry: Telemetry, refresh: Callable[[], None], port: int
) -> web.AppRunner:
    """Serve /metrics; ``refresh`` sets the gauges before each scrape."""

    async def metrics(_: web.Request) -> web.Response:
        refresh()
        return web.Response(
            body=generate_latest(telemetry.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    return await _serve({"/metrics": metrics}, port)


async def serve_probes(healthy: Check, ready: Check, port: int) -> web.AppRunner:
    """Serve /healthz and /readyz: 200 "ok", or 503 with the reasons. Returns the running server."""

    def probe(check: Check) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            problems = check()
            return web.Response(
                status=503 if problems else 200, text="\n".join(problems or ["ok"]) + "\n"
            )

        return answer

    return await _serve({"/healthz": probe(healthy), "/readyz": probe(ready)}, port)


async def _serve(
    routes: Mapping[str, Callable[[web.Request], Awaitable[web.Response]]], port: int
) -> web.AppRunner:
    app = web.Application()
    app.add_routes([web.get(path, handler) for path, handler in routes.items()])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
