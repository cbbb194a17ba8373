"""Builds an engine from a model folder: the only place where all parts meet."""

import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tilefleet_worker import gpu_device, kernel_cache
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.collectives import Collectives
from tilefleet_worker.cpu_engine import load_cpu
from tilefleet_worker.cpu_ranks import CPURank, LeadingModel
from tilefleet_worker.engine import Engine
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.kv_cache import block_bytes, host_blocks_for
from tilefleet_worker.layer_kinds import FULL, LayerKind
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.pipeline import StepRunner
from tilefleet_worker.rank_group import RankGroup
from tilefleet_worker.rank_messages import RankRunner
from tilefleet_worker.runner import Runner
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.shards import Shard
from tilefleet_worker.stats import EngineInfo
from tilefleet_worker.weights import Progress

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


@dataclass(frozen=True, slots=True)
class _Built:
    """The device's side of an engine, warmed up."""

    runner: StepRunner
    num_blocks: int
    host_blocks: int
    block_bytes: int
    kinds: tuple[LayerKind, ...]
    batch_invariant: bool
    device: Mapping[str, Any]
    facts: Mapping[str, Any]
    """What else was measured, for `/stats`."""
    prompt_tokens: int = 0
    """Tokens of prompts that fill a step; 0: as many as a step may have."""


def build_engine(
    model_dir: Path,
    options: EngineConfig,
    *,
    on_phase: OnPhase | None = None,
    on_progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """Load a model and build its engine, warmed up and not yet started.

    Phases reported: weights, pool, warmup, and on a GPU capture. Raises ModelError when the folder
    cannot be served and ConfigError when the options do not fit it or the device.
    """
    phases = _Phases(on_phase, clock)
    model_config = ModelConfig.from_folder(model_dir)
    config = options.resolve(model_max_len=model_config.max_positions, gpu=gpu_device.available())
    Shard(0, config.tensor_parallel).config(model_config)  # refuse before anything is started
    threads = _share_threads(config)
    ranks = None
    if config.tensor_parallel > 1:
        ranks = RankGroup(config.tensor_parallel, config.backend, threads)
        ranks.load({"model_dir": str(model_dir), "config": asdict(config)})
    build = _on_gpu if config.backend == "triton" else _on_cpu
    try:
        built = build(model_dir, model_config, config, phases, on_progress, ranks)
    except BaseException:
        _end(ranks)
        raise
    if not built.batch_invariant:
        LOGGER.warning("on this device a request's last bits depend on its batch-mates")
    config = replace(config, kv_cache_bytes=config.kv_cache_bytes or _pool_size(built))
    info = EngineInfo(
        vocab_size=model_config.vocab_size,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        eos_token_ids=model_config.eos_token_ids,
        device=built.device,
        config={
            **asdict(config),
            "threads": torch.get_num_threads(),
            "batch_invariant": built.batch_invariant,
            "kv_block_bytes": built.block_bytes,
            "kv_layer_kinds": {kind.name: kind.width for kind in built.kinds},
            "kv_bytes_per_rank": _pool_size(built) // config.tensor_parallel,
            **built.facts,
        },
        startup=tuple(phases.done),
    )
    scheduler = _scheduler(model_dir, model_config, config, built)
    engine = Engine(config, built.runner, scheduler, clock, info, partial(_end, ranks))
    if ranks is not None:
        ranks.on_death(engine.fail)
    return engine


def _share_threads(config: EngineConfig) -> int:
    """Set this process's compute threads, its share of all. Returns their number."""
    if config.threads:
        torch.set_num_threads(max(1, config.threads // config.tensor_parallel))
    return torch.get_num_threads()


def _end(ranks: RankGroup | None) -> None:
    """End the other ranks, if there are any."""
    if ranks is None:
        return
    ranks.close()
    if ranks.failure is None:  # else a GPU's library may wait for the dead
        Collectives.leave()


def load_rank(
    model_dir: Path,
    config: EngineConfig,
    collectives: Collectives,
    device: torch.device,
    after_weights: Callable[[], None],
) -> RankRunner:
    """What another rank than the first computes with. config: as the first one has resolved it.

    after_weights: called when this rank's weights are read, to meet the others.
    """
    model_config = ModelConfig.from_folder(model_dir)
    if config.backend == "triton":
        # Not above: imports Triton, which a worker on a CPU need not have.
        from tilefleet_worker.gpu_engine import load_gpu

        kernel_cache.adopt(os.environ)
        runner, _ = load_gpu(
            model_dir, model_config, config, device, collectives, after_weights=after_weights
        )
        return runner
    parts = load_cpu(model_dir, model_config, config, collectives, after_weights=after_weights)
    return CPURank(parts.model, parts.cache, parts.attention)


def _collectives(
    config: EngineConfig, ranks: RankGroup | None, device: torch.device
) -> Collectives | None:
    if ranks is None:
        return None
    return Collectives(0, ranks.size, device, config.batch_invariant)


def _meet(ranks: RankGroup | None, collectives: Collectives | None) -> None:
    """Wait until every rank has its weights, then join them."""
    if ranks is not None and collectives is not None:
        ranks.await_all()
        collectives.join(ranks.store)


def _pool_size(built: _Built) -> int:
    return (built.num_blocks + 1) * built.block_bytes  # and the spare block


def _on_cpu(
    model_dir: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    phases: _Phases,
    on_progress: Progress | None,
    ranks: RankGroup | None,
) -> _Built:
    collectives = _collectives(config, ranks, torch.device("cpu"))

    def after_weights() -> None:
        _meet(ranks, collectives)
        phases.end("weights")

    parts = load_cpu(
        model_dir, model_config, config, collectives, after_weights=after_weights,
        on_progress=on_progress, on_scrub=None if ranks is None else ranks.scrub,
    )  # fmt: skip
    phases.end("pool")
    model, cache = parts.model, parts.cache
    if ranks is not None:
        model = LeadingModel(model, ranks, model_config.vocab_size)
    kinds, size = cache.layout.kinds, parts.block_bytes * config.tensor_parallel
    host_blocks = host_blocks_for(config.kv_offloading_bytes, size, kinds)
    runner = Runner(model, cache, parts.attention, host_blocks)
    runner.warm_up(config.max_batch_tokens)
    batch_invariant = runner.batch_invariant()
    phases.end("warmup")
    return _Built(runner, cache.num_blocks, host_blocks, size, kinds, batch_invariant, _cpu(), {})


def _on_gpu(
    model_dir: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    phases: _Phases,
    on_progress: Progress | None,
    ranks: RankGroup | None,
) -> _Built:
    device = gpu_device.require(0, config.tensor_parallel)
    adopted = kernel_cache.adopt(os.environ)
    if adopted:
        LOGGER.info("%d compiled kernels taken from the image", adopted)
    # Not above: imports Triton, which a worker on a CPU need not have.
    from tilefleet_worker.gpu_engine import DTYPES, load_gpu, prompt_step_tokens

    collectives = _collectives(config, ranks, device)

    def after_weights() -> None:
        _meet(ranks, collectives)
        phases.end("weights")

    try:
        runner, cache = load_gpu(
            model_dir, model_config, config, device, collectives, ranks,
            after_weights=after_weights, on_progress=on_progress,
        )  # fmt: skip
        phases.end("pool")
        runner.warm_up(config.max_batch_tokens)
        phases.end("warmup")
        runner.capture()
        runner.check()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The GPU's memory is too small: {str(error).splitlines()[0]} Lower "
            "--gpu-memory-fraction or --kv-cache-memory if the weights did fit, --max-batch-tokens "
            "or --max-concurrent, or take a larger GPU."
        ) from error
    batch_invariant = runner.batch_invariant()
    phases.end("capture")
    own = Shard(0, config.tensor_parallel).config(model_config)
    size = block_bytes(own, config.block_size, DTYPES[config.dtype]) * config.tensor_parallel
    host_blocks = host_blocks_for(config.kv_offloading_bytes, size, (FULL,))
    facts = gpu_device.facts(device)
    kinds = cache.layout.kinds
    return _Built(
        runner, cache.num_blocks, host_blocks, size, kinds, batch_invariant, facts,
        runner.graph_facts, prompt_step_tokens(own),
    )  # fmt: skip


def _scheduler(
    model_dir: Path, model_config: ModelConfig, config: EngineConfig, built: _Built
) -> Scheduler:
    pool = BlockPool(
        built.num_blocks,
        config.block_size,
        kinds=built.kinds,
        token_bytes=built.block_bytes // config.block_size,
        prefix_caching=config.prefix_caching,
        host_blocks=built.host_blocks,
        fingerprint=f"{model_dir.resolve()}|{model_config}|{config.dtype}|{config.block_size}",
    )
    return Scheduler(
        pool,
        config.max_batch_tokens,
        config.max_concurrent,
        config.max_model_len,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        max_drafts=config.speculative_ngram,
        prompt_tokens=built.prompt_tokens,
    )


def _cpu() -> dict[str, Any]:
    """The CPU as `/stats` reports devices. memory_bytes is of the machine, not of the container."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "kind": "cpu",
        "name": platform.processor() or platform.machine(),
        "arch": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": pages * page_bytes,
    }
