"""Builds an engine from a model folder: the only place where all parts meet."""

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tilefleet_worker import attention, models
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.engine import Engine
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.kv_cache import KVCache, block_bytes, num_blocks_for
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.runner import Runner
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.stats import EngineInfo
from tilefleet_worker.weights import Progress, Weights

LOGGER = logging.getLogger(__name__)

OnPhase = Callable[[str, float], None]
"""Called with (phase, seconds it took) when a start-up phase has ended."""


class _Phases:
    """Times the phases of a start, one after the other."""

    def __init__(self, on_phase: OnPhase | None, clock: Callable[[], float]) -> None:
        self.done: list[tuple[str, float]] = []
        self._on_phase = on_phase
        self._clock = clock
        self._began = clock()

    def end(self, phase: str) -> None:
        now = self._clock()
        self.done.append((phase, now - self._began))
        self._began = now
        LOGGER.info("start-up phase %s took %.2f s", *self.done[-1])
        if self._on_phase is not None:
            self._on_phase(*self.done[-1])


def build_engine(
    model_dir: Path,
    options: EngineConfig,
    *,
    on_phase: OnPhase | None = None,
    on_progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """Load a model and build its engine, warmed up and not yet started.

    Phases reported: weights, pool, warmup. Raises ModelError when the folder cannot be served and
    ConfigError when the options do not fit it.
    """
    phases = _Phases(on_phase, clock)
    model_config = ModelConfig.from_folder(model_dir)
    config = options.resolve(model_max_len=model_config.max_positions)
    backend = attention.create(config.backend, model_config)
    num_blocks = num_blocks_for(model_config, config.block_size, config.kv_cache_bytes)
    if config.threads:
        torch.set_num_threads(config.threads)
    with torch.inference_mode(), Weights(model_dir, on_progress) as weights:
        model = models.load(model_config, weights, config.max_model_len)
    phases.end("weights")
    cache = KVCache(model_config, num_blocks, config.block_size)
    phases.end("pool")
    runner = Runner(model, cache, backend)
    runner.warm_up(config.max_batch_tokens)
    batch_invariant = runner.batch_invariant()
    if not batch_invariant:
        LOGGER.warning("on this processor a request's last bits depend on its batch-mates")
    phases.end("warmup")
    info = EngineInfo(
        vocab_size=model_config.vocab_size,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        eos_token_ids=model_config.eos_token_ids,
        device=_device(),
        config={
            **asdict(config),
            "threads": torch.get_num_threads(),
            "batch_invariant": batch_invariant,
            "kv_block_bytes": block_bytes(model_config, config.block_size),
        },
        startup=tuple(phases.done),
    )
    return Engine(
        config, runner, _scheduler(model_dir, model_config, config, num_blocks), clock, info
    )


def _scheduler(
    model_dir: Path, model_config: ModelConfig, config: EngineConfig, num_blocks: int
) -> Scheduler:
    pool = BlockPool(
        num_blocks,
        config.block_size,
        prefix_caching=config.prefix_caching,
        fingerprint=f"{model_dir.resolve()}|{model_config}|{config.dtype}|{config.block_size}",
    )
    return Scheduler(
        pool,
        config.max_batch_tokens,
        config.max_concurrent,
        config.max_model_len,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
    )


def _device() -> dict[str, Any]:
    """The CPU as `/stats` reports devices. memory_bytes is of the machine, not of the container."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "kind": "cpu",
        "name": platform.processor() or platform.machine(),
        "arch": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": pages * page_bytes,
    }
