"""From flags to a worker that has answered once: download, load, warm up, decode one token.

Runs in a thread of its own, so that the probes answer while torch is imported and weights are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tilefleet_worker.config import ServeConfig, engine_config, resolve, usable_cpus
from tilefleet_worker.engine import Engine
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import EngineError
from tilefleet_worker.grammar import Grammars
from tilefleet_worker.request import Delta, Request, SamplingParams
from tilefleet_worker.server.answers import AnswerDesk
from tilefleet_worker.server.conventions import Conventions
from tilefleet_worker.server.state import Service, WorkerState
from tilefleet_worker.sources import PROGRESS_SECONDS, fetch

if TYPE_CHECKING:
    from tilefleet_worker.tokenizer import Tokenizer

LOGGER = logging.getLogger(__name__)

SELF_TEST_SECONDS = 120.0


class BuildEngine(Protocol):
    """What turns a model folder into an engine that is warmed up but not started."""

    def __call__(
        self,
        model_dir: Path,
        options: EngineConfig,
        *,
        on_phase: Callable[[str, float], None],
        on_progress: Callable[[int, int], None],
    ) -> Engine:
        """Load and warm up.

        on_phase: told each phase that ended and its seconds. on_progress: bytes read, bytes of all.
        Raises ModelError or ConfigError when the model cannot be served.
        """


def import_builder() -> BuildEngine:
    """The real engine's builder. Imports torch: seconds, so never before the ports listen."""
    from tilefleet_worker.factory import build_engine

    return build_engine


class Startup:
    """Loads the model of one worker."""

    def __init__(
        self,
        state: WorkerState,
        desk: AnswerDesk,
        builder: Callable[[], BuildEngine] = import_builder,
    ) -> None:
        """builder: imports and returns the engine's builder; tests pass one without torch."""
        self._state = state
        self._desk = desk
        self._builder = builder

    async def run(self) -> None:
        """Load in a thread, then let the state become ready.

        Raises what loading raised: ConfigError, ModelError, EngineError.
        """
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Service] = loop.create_future()

        def load() -> None:
            try:
                service = self._load(loop)
            except Exception as error:
                _post(loop, loaded, partial(loaded.set_exception, error))
            else:
                _post(loop, loaded, partial(loaded.set_result, service))

        # A daemon: SIGTERM must end the process while torch is still being imported.
        threading.Thread(target=load, name="startup", daemon=True).start()
        self._state.become_ready(await loaded)

    def _load(self, loop: asyncio.AbstractEventLoop) -> Service:
        began = time.monotonic()
        config = self._state.config
        num_cpus = usable_cpus(os.cpu_count() or 1)
        # The model first: a wrong path or tokenizer is reported before seconds of imports.
        with self._phase("download"):
            folder = fetch(config.model, Path(config.cache_dir), config.hf_endpoint)
            # Here, not above: a fifth of the imports' time, and the ports should listen first.
            from tilefleet_worker.tokenizer import Tokenizer

            tokenizer = Tokenizer.load(folder)
        with self._phase("import"):
            build = self._builder()
        self._state.begin_phase("weights")
        options = engine_config(config, num_cpus=num_cpus)
        engine = build(folder, options, on_phase=self._state.end_phase, on_progress=_Progress())
        conventions = _conventions(config, tokenizer)
        resolved = resolve(config, engine.config, conventions.flags)
        with self._phase("warmup"):
            self_test(engine)
            self._desk.connect(engine, loop)
        gc.freeze()  # the model's objects stay: the collector need not look at them again
        LOGGER.info("ready after %.1f s: %s", time.monotonic() - began, _shown(resolved))
        grammars = _grammars(engine, tokenizer)
        return Service(resolved, engine, tokenizer, grammars, conventions, int(time.time()))

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._state.begin_phase(name)
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._state.end_phase(name, seconds)
        LOGGER.info("start phase %s took %.2f s", name, seconds)


class _Progress:
    """Logs how much of the weights is read, a line every PROGRESS_SECONDS."""

    def __init__(self) -> None:
        self._next_seconds = time.monotonic() + PROGRESS_SECONDS

    def __call__(self, num_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._next_seconds:
            self._next_seconds = now + PROGRESS_SECONDS
            LOGGER.info("weights: %.0f of %.0f MiB", num_bytes / 2**20, total_bytes / 2**20)


def _post(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Service], act: Callable[[], None]
) -> None:
    def deliver() -> None:
        if not future.done():
            act()

    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
        loop.call_soon_threadsafe(deliver)


def _conventions(config: ServeConfig, tokenizer: Tokenizer) -> Conventions:
    template = tokenizer.chat_template
    source = None if template is None else template.source
    return Conventions.of(config.tool_call_parser, config.reasoning_parser, source)


def _grammars(engine: Engine, tokenizer: Tokenizer) -> Grammars:
    ends = engine.info.eos_token_ids or tuple(filter(None, [tokenizer.eos_token_id]))
    return Grammars(tokenizer.to_json(), engine.info.vocab_size, ends)


def self_test(engine: Engine) -> None:
    """Start the engine and decode two real tokens. Raises EngineError when that fails."""
    ended = threading.Event()
    seen: list[Delta] = []

    def sink(deltas: list[Delta]) -> None:
        seen.extend(deltas)
        if any(delta.finish_reason is not None for delta in deltas):
            ended.set()

    engine.set_sink(sink)
    engine.start()
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    refusal = engine.submit(Request("self-test", (0,), params, time.monotonic()))
    if refusal is not None:
        raise EngineError(f"the self-test was refused: {refusal.message}")
    if not ended.wait(SELF_TEST_SECONDS):
        raise EngineError(f"the self-test gave no token within {SELF_TEST_SECONDS:.0f} s")
    if seen[-1].finish_reason != "length":
        raise EngineError(f"the self-test failed: {seen[-1].error or seen[-1].finish_reason}")


def _shown(config: ServeConfig) -> str:
    return (
        f"{config.served_model_name} on {config.backend}, {config.dtype}, "
        f"{config.threads} threads, tool calls {config.tool_call_parser}, "
        f"reasoning {config.reasoning_parser}, "
        f"{config.max_model_len} tokens, {config.kv_cache_memory / 2**20:.0f} MiB of KV cache"
    )
