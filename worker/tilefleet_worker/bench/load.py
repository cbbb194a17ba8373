"""Runs a case on an engine in a closed loop and notes when each token came."""

import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tilefleet_worker.bench.cases import Case
from tilefleet_worker.engine import Engine
from tilefleet_worker.errors import ConfigError, EngineError
from tilefleet_worker.request import Delta, Request, SamplingParams

LOOK_SECONDS = 0.02
"""Between two looks at the pool, which cost the engine's thread time."""
PATIENCE_SECONDS = 600.0
"""Without any token for so long the engine is taken to hang."""


@dataclass(slots=True)
class Timeline:
    """Of one request: seconds on the engine's clock."""

    began: float
    prompt: int
    arrivals: list[float] = field(default_factory=list)
    """When each token of its answer came."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a case did, its warm-ups left out."""

    timelines: tuple[Timeline, ...]
    seconds: float
    """From the first submission to the last token."""
    kv_live_bytes: int
    """Of the pool, computed keys and values of running requests at the most."""
    kv_pool_bytes: int


class Loader:
    """Drives one engine, which it starts. Prompts are random tokens, so no prefix is shared."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._arrived: queue.SimpleQueue[tuple[float, list[Delta]]] = queue.SimpleQueue()
        self._number = 0
        engine.set_sink(lambda deltas: self._arrived.put((clock(), deltas)))
        engine.start()

    def run(self, case: Case) -> Load:
        """Run a case to its end.

        Raises ConfigError with the engine's words when it can never hold such a request, and
        EngineError when a request ends before its last token, or nothing comes.
        """
        lengths = case.lengths()
        self._run(lengths[: case.warm_ups], case.concurrency)
        return self._run(lengths[case.warm_ups :], case.concurrency)

    def _run(self, lengths: list[tuple[int, int]], concurrency: int) -> Load:
        running: dict[str, Timeline] = {}
        try:
            return self._closed_loop(lengths, concurrency, running)
        except ConfigError:
            self._abandon(running)
            raise

    def _closed_loop(
        self, lengths: list[tuple[int, int]], concurrency: int, running: dict[str, Timeline]
    ) -> Load:
        done: list[Timeline] = []
        todo = iter(lengths)
        began = now = looked = self._clock()
        live, total = 0, self._engine.stats().kv.total
        while len(done) < len(lengths):
            for prompt, answer in todo if len(running) < concurrency else ():
                name, timeline = self._submit(prompt, answer)
                running[name] = timeline
                if len(running) == concurrency:
                    break
            now, deltas = self._next()
            for delta in deltas:
                timeline = running[delta.request_id]
                timeline.arrivals += [now] * len(delta.token_ids)
                if delta.finish_reason is not None:
                    done.append(running.pop(delta.request_id))
                    _check(delta)
            if now - looked > LOOK_SECONDS or not live:
                looked, kv = now, self._engine.stats().kv
                live, total = max(live, kv.by_cause()["live"]), kv.total
        return Load(tuple(done), now - began, live, total)

    def _abandon(self, running: dict[str, Timeline]) -> None:
        """End what is in flight, so that the next case finds nothing of it."""
        for name in running:
            self._engine.abort(name)
        while running:
            for delta in self._next()[1]:
                if delta.finish_reason is not None:
                    running.pop(delta.request_id)

    def _submit(self, prompt: int, answer: int) -> tuple[str, Timeline]:
        self._number += 1
        name = f"bench-{self._number}"
        draw = random.Random(name)
        tokens = draw.choices(range(self._engine.info.vocab_size), k=prompt)
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        now = self._clock()
        refusal = self._engine.submit(Request(name, tokens, params, now))
        if refusal is not None:
            raise ConfigError(refusal.message)
        return name, Timeline(now, prompt)

    def _next(self) -> tuple[float, list[Delta]]:
        try:
            return self._arrived.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            why = self._engine.failure or self._engine.stall() or "no reason is known"
            raise EngineError(f"No token in {PATIENCE_SECONDS:.0f} s: {why}.") from None


def _check(delta: Delta) -> None:
    if delta.finish_reason != "length":
        raise EngineError(
            f"Request {delta.request_id} ended with {delta.finish_reason!r} before its last token"
            f"{f': {delta.error}' if delta.error else ''}."
        )
