"""What the worker is doing: start phases, readiness, draining, and the parts once they exist.

Read by both ports, written by start-up and drain. Event loop only, except for `begin_phase`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from tilefleet_worker.config import ServeConfig
from tilefleet_worker.engine import Engine
from tilefleet_worker.grammar import Grammars
from tilefleet_worker.server.conventions import Conventions
from tilefleet_worker.server.replies import ApiError, draining, not_ready
from tilefleet_worker.stats import EngineStats

if TYPE_CHECKING:
    from tilefleet_worker.tokenizer import Tokenizer

STATS_VERSION = 1
KV_CAUSES = ("used", "wasted", "cached", "free", "spare")
COUNTERS = (
    "arrivals",
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "generated_tokens",
    "completions",
    "aborts",
    "timeouts",
    "errors",
    "steps",
    "busy_seconds",
    "preemptions",
    "drafts",
    "draft_tokens",
    "accepted_tokens",
)
GAUGES = (
    "running",
    "waiting",
    "waiting_prompt_tokens",
    "oldest_wait_seconds",
    "kv_blocks_total",
    "kv_blocks_used",
    "kv_blocks_cached",
    "kv_tokens_wasted",
    "max_concurrent",
    "max_model_len",
)
EMPTY_STATS = EngineStats(dict.fromkeys(COUNTERS, 0), dict.fromkeys(GAUGES, 0), ())


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """The parts that exist once the model is loaded and answered its warm-up."""

    config: ServeConfig
    engine: Engine
    tokenizer: Tokenizer
    grammars: Grammars
    conventions: Conventions
    created: int
    """Unix time at which the model became servable; /v1/models reports it."""

    @property
    def max_total_tokens(self) -> int:
        """Most tokens of prompt and answer together: the model's length, or the whole KV pool."""
        blocks = int(self.engine.stats().gauges["kv_blocks_total"])
        return min(self.config.max_model_len, blocks * self.config.block_size)


class WorkerState:
    """One per process."""

    def __init__(self, config: ServeConfig, revision: str = "") -> None:
        """config: as given, before resolve. revision: the operator's name for this pod template."""
        self.config = config
        self.model_name = config.model_name()
        self.revision = revision
        self.started_seconds = time.monotonic()
        self.phase = "start"
        self.phases: dict[str, float] = {}
        self.service: Service | None = None
        self.draining = False
        self.accepting = True

    @property
    def resolved(self) -> ServeConfig:
        """The config without any "auto" once the model is loaded; before that, as given."""
        return self.config if self.service is None else self.service.config

    def served(self) -> Service:
        """The service. Raises ApiError 503 before the model is loaded."""
        if self.service is None:
            raise not_ready()
        return self.service

    def admit(self, model: str) -> Service:
        """The service for a new generation, or the ApiError that says why there is none now."""
        if not self.accepting:
            raise draining()
        service = self.served()
        self.check_model(model)
        return service

    def check_model(self, model: str | None) -> None:
        """Raise ApiError 404 for another model than the served one; None asks for no name."""
        if model is not None and model != self.model_name:
            message = f"Model {model!r} is not served here: use {self.model_name!r}."
            raise ApiError(404, "model_not_found", message, "model")

    def begin_phase(self, phase: str) -> None:
        """Note that a start phase begins. Any thread."""
        self.phase = phase

    def end_phase(self, phase: str, seconds: float) -> None:
        """Note how long a start phase took. Any thread."""
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def become_ready(self, service: Service) -> None:
        """The model is loaded and has answered: serve it."""
        self.service = service
        self.phase = "serving"

    def why_not_ready(self) -> str | None:
        """Why /readyz fails, or None."""
        if self.draining:
            return "draining"
        if self.service is None:
            return f"starting: {self.phase}"
        return self.service.engine.failure

    def why_not_live(self) -> str | None:
        """Why /livez fails, or None. Loading and load are no reasons."""
        return None if self.service is None else self.service.engine.stall()

    def engine_stats(self) -> EngineStats:
        """The engine's numbers; zeros before it exists."""
        return EMPTY_STATS if self.service is None else self.service.engine.stats()

    def stats(self) -> dict[str, Any]:
        """The body of /stats. Bounded: at most 64 steps and a fixed set of names."""
        service, config = self.service, self.resolved
        info = None if service is None else service.engine.info
        return {
            "version": STATS_VERSION,
            "model": self.model_name,
            "revision": self.revision,
            "uptime_seconds": time.monotonic() - self.started_seconds,
            "draining": self.draining,
            "ready": self.why_not_ready() is None,
            "phase": self.phase,
            "block_size": config.block_size,
            **self.engine_stats().as_dict(),
            "startup": [{"phase": name, "seconds": s} for name, s in list(self.phases.items())],
            "device": {} if info is None else dict(info.device),
            "config": dataclasses.asdict(config) | ({} if info is None else dict(info.config)),
        }

    def kv(self) -> dict[str, Any]:
        """The body of /kv: bytes of the pool by cause; those of KV_CAUSES sum to `total`.

        used: computed tokens of running requests that are still read, and places of those that are
        next. wasted: places behind them, or that left a window. cached: of nobody, but can be hit
        again. free: hold nothing. spare: one block that no request gets, for rows that only fill a
        batch up. kinds: the same for each kind of layers, with used as live and reserved, and
        on_host: evicted prefixes in host memory. host: what that memory is used for; cached and
        free sum to its total, which is no part of the pool's.
        """
        found = self.engine_stats().kv
        causes = found.by_cause()
        return {
            "block_bytes": found.spare,
            "total": found.total,
            "used": causes["live"] + causes["reserved"],
            **{cause: causes[cause] for cause in KV_CAUSES if cause != "used"},
            "host": {**found.host_by_cause(), "total": found.host_total},
            "kinds": [dataclasses.asdict(kind) for kind in found.kinds],
        }
