"""What a worker says of itself at /stats.

Knows the document and its bounds; knows no pod, no clock and no meaning of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.errors import ObservationInvalid

STATS_VERSION = 1


@dataclass(frozen=True)
class Step:
    """One forward pass of an engine: its duration and what was in the batch."""

    seconds: float
    prefill_tokens: int
    sequences: int
    kv_tokens: int


@dataclass(frozen=True)
class Counters:
    """Totals since the worker's process began; they fall only when it restarts."""

    arrivals: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    generated_tokens: int = 0
    completions: int = 0
    aborts: int = 0
    errors: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    preemptions: int = 0
    timeouts: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Gauges:
    """The worker's state at the moment of the answer."""

    running: int = 0
    waiting: int = 0
    waiting_prompt_tokens: int = 0
    oldest_wait_seconds: float = 0.0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_tokens_wasted: int = 0
    max_concurrent: int = 0
    max_model_len: int = 0


@dataclass(frozen=True)
class WorkerStats:
    """One worker's /stats answer. age_seconds: its age at the time of the snapshot."""

    model: str = ""
    revision: str = ""
    uptime_seconds: float = 0.0
    draining: bool = False
    ready: bool = False
    block_size: int = 0
    counters: Counters = field(default_factory=Counters)
    gauges: Gauges = field(default_factory=Gauges)
    steps: tuple[Step, ...] = ()
    startup: tuple[tuple[str, float], ...] = ()
    device: Mapping[str, Any] = field(default_factory=dict)
    age_seconds: float = 0.0

    @property
    def inflight(self) -> int:
        """Requests that would be cut if the process ended now."""
        return self.gauges.running + self.gauges.waiting


@dataclass(frozen=True)
class MissingStats:
    """No usable /stats answer, and why. Absence is never zero load."""

    reason: str


def worker_stats(document: Mapping[str, Any], age_seconds: float = 0.0) -> WorkerStats:
    """The typed form of a /stats document.

    Raises ObservationInvalid, naming the field, when the version differs or a value has the wrong
    type.
    """
    if document.get("version") != STATS_VERSION:
        raise ObservationInvalid(
            f"/stats: version {document.get('version')!r} is not {STATS_VERSION}; the worker image"
            " and the operator do not belong together"
        )
    try:
        return WorkerStats(
            model=str(document["model"]),
            revision=str(document.get("revision", "")),
            uptime_seconds=float(document["uptime_seconds"]),
            draining=bool(document["draining"]),
            ready=bool(document["ready"]),
            block_size=int(document.get("block_size", 0)),
            counters=Counters(**_numbers(document["counters"], Counters)),
            gauges=Gauges(**_numbers(document["gauges"], Gauges)),
            steps=tuple(_step(s) for s in document.get("steps", ())),
            startup=tuple((str(p["phase"]), float(p["seconds"])) for p in document["startup"]),
            device=dict(document.get("device") or {}),
            age_seconds=age_seconds,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ObservationInvalid(f"/stats: {type(error).__name__}: {error}") from error


def _numbers(document: Mapping[str, Any], kind: type[Counters] | type[Gauges]) -> dict[str, Any]:
    """Known fields of a group of numbers; unknown ones belong to a newer worker and are skipped."""
    names = kind.__dataclass_fields__
    known = {name: document[name] for name in names if name in document}
    for name, value in known.items():
        _number(name, value)
    return known


def _number(name: str, value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name}: {value!r} is not a number of at least 0")
    return value  # type: ignore[return-value]


def _step(step: Mapping[str, Any]) -> Step:
    return Step(
        float(_number("seconds", step["seconds"])),
        int(step["prefill_tokens"]),
        int(step["sequences"]),
        int(step["kv_tokens"]),
    )
