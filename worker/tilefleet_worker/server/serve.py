"""One process, one event loop, two listeners: start, serve, drain at SIGTERM, exit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from tilefleet_worker import termination
from tilefleet_worker.config import ServeConfig
from tilefleet_worker.errors import ConfigError, EngineError, ModelError, WorkerError
from tilefleet_worker.server.admin import create_admin
from tilefleet_worker.server.answers import AnswerDesk
from tilefleet_worker.server.app import create_app
from tilefleet_worker.server.auth import KeyFile
from tilefleet_worker.server.drain import Drain
from tilefleet_worker.server.metrics import Metrics, without_created_series
from tilefleet_worker.server.startup import BuildEngine, Startup, import_builder
from tilefleet_worker.server.state import WorkerState

LOGGER = logging.getLogger(__name__)

# Longer than the idle time-out of usual proxies, so that they, not we, close idle connections.
_KEEP_ALIVE_SECONDS = 75
# h11's own bound on header bytes; ours (limits.py) is lower and answers with an error body.
_PARSER_HEADER_BYTES = 64 * 2**10
_HEALTH_POLL_SECONDS = 0.5
_STOP_SECONDS = 15.0


class Listener(uvicorn.Server):
    """uvicorn without its signal handlers: they would stop accepting at once, we drain first."""

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=_PARSER_HEADER_BYTES,
        )
        super().__init__(config)
        self._bound = bound

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def run_until_told(self) -> None:
        """Serve until `should_exit`, then finish open replies and close."""
        await self.serve(sockets=[self._bound])


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket. Raises ConfigError that names the flag when that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{flag} {port}: cannot listen on {host}: {error}") from error


class Worker:
    """The parts of one worker process."""

    def __init__(self, config: ServeConfig, builder: Callable[[], BuildEngine]) -> None:
        """Reads the key file and binds both ports. Raises ConfigError when one of them fails.

        builder: imports and returns the engine's builder.
        """
        without_created_series()
        keys = KeyFile(Path(config.api_key_file)) if config.api_key_file else None
        self.state = WorkerState(config, os.environ.get("TILEFLEET_REVISION", ""))
        metrics = Metrics(self.state)
        self._desk = AnswerDesk(metrics)
        self._drain = Drain(self.state, self._desk)
        self._startup = Startup(self.state, self._desk, builder)
        admin_socket = bind(config.host, config.admin_port, "--admin-port")
        api_socket = bind(config.host, config.port, "--port")
        self._api = Listener(create_app(self.state, self._desk, metrics, keys), api_socket)
        self._admin = Listener(create_admin(self.state, metrics, self._drain), admin_socket)
        self._ports = api_socket.getsockname()[1], admin_socket.getsockname()[1]
        self._exit = asyncio.Event()
        self._exit_requested = False

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Raises WorkerError when it cannot serve."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        listeners = [
            loop.create_task(listener.run_until_told()) for listener in (self._api, self._admin)
        ]
        LOGGER.info("listening: api port %d, admin port %d", *self._ports)
        try:
            await self._until_exit()
        finally:
            self._api.should_exit = self._admin.should_exit = True
            await asyncio.gather(*listeners)
            await self._stop_engine()

    async def _until_exit(self) -> None:
        """Load, then watch the engine; whichever ends first, the exit or a fault, decides."""
        exit_ = asyncio.ensure_future(self._exit.wait())
        life = asyncio.ensure_future(self._live())
        try:
            await asyncio.wait((exit_, life), return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                life.result()
        finally:
            for task in (exit_, life):
                task.cancel()
            await asyncio.gather(exit_, life, return_exceptions=True)

    async def _live(self) -> None:
        await self._startup.run()
        while True:
            await asyncio.sleep(_HEALTH_POLL_SECONDS)
            failure = self.state.service.engine.failure if self.state.service else None
            if failure is not None:
                self._drain.begin(0.0)
                self._drain.hurry()
                raise EngineError(f"the engine ended: {failure}")

    def _on_signal(self) -> None:
        """First signal: drain, then exit. A further one: cut what runs."""
        if self._exit_requested:
            self._drain.hurry()
            return
        self._exit_requested = True
        task = self._drain.begin(self.state.config.drain_timeout)
        task.add_done_callback(lambda _: self._exit.set())

    async def _stop_engine(self) -> None:
        if self.state.service is not None:
            await asyncio.to_thread(self.state.service.engine.stop, _STOP_SECONDS)


def serve(config: ServeConfig, builder: Callable[[], BuildEngine] = import_builder) -> int:
    """Run a worker to its end. Returns the exit status.

    0 drained, 1 fault, 2 configuration, 3 model. What is not 0 also leaves a termination message.
    """
    try:
        asyncio.run(_run(config, builder))
    except Exception as error:
        termination.write(error)
        if not isinstance(error, WorkerError):
            LOGGER.exception("the worker failed")
            return 1
        LOGGER.error("%s: %s", type(error).__name__, error)
        return {ConfigError: 2, ModelError: 3}.get(type(error), 1)
    LOGGER.info("exit")
    return 0


async def _run(config: ServeConfig, builder: Callable[[], BuildEngine]) -> None:
    await Worker(config, builder).run()
