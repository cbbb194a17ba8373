"""Builds an engine from a model folder: the only place where all parts meet."""

import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tilefleet_worker import attention, gpu_device, kernel_cache, models
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.engine import Engine
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.kv_cache import KVCache, block_bytes, host_blocks_for, num_blocks_for
from tilefleet_worker.layer_kinds import FULL, CacheLayout, LayerKind
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.pipeline import StepRunner
from tilefleet_worker.runner import Runner
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.stats import EngineInfo
from tilefleet_worker.weights import Progress, Weights

LOGGER = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
    if config.threads:
        torch.set_num_threads(config.threads)
    build = _on_gpu if config.backend == "triton" else _on_cpu
    built = build(model_dir, model_config, config, phases, on_progress)
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
            **built.facts,
        },
        startup=tuple(phases.done),
    )
    scheduler = _scheduler(model_dir, model_config, config, built)
    return Engine(config, built.runner, scheduler, clock, info)


def _pool_size(built: _Built) -> int:
    return (built.num_blocks + 1) * built.block_bytes  # and the spare block


def _on_cpu(
    model_dir: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    phases: _Phases,
    on_progress: Progress | None,
) -> _Built:
    backend = attention.create(config.backend, model_config)
    layout = CacheLayout.of(model_config.windows, config.max_model_len)
    size = block_bytes(model_config, config.block_size, layout=layout)
    num_blocks = num_blocks_for(
        model_config, config.block_size, config.kv_cache_bytes, layout=layout
    )
    with torch.inference_mode(), Weights(model_dir, on_progress) as weights:
        model = models.load(model_config, weights, config.max_model_len)
    phases.end("weights")
    cache = KVCache(model_config, num_blocks, config.block_size, layout=layout)
    phases.end("pool")
    host_blocks = host_blocks_for(config.kv_offloading_bytes, size, layout.kinds)
    runner = Runner(model, cache, backend, host_blocks)
    runner.warm_up(config.max_batch_tokens)
    batch_invariant = runner.batch_invariant()
    phases.end("warmup")
    return _Built(runner, num_blocks, host_blocks, size, layout.kinds, batch_invariant, _cpu(), {})


def _on_gpu(
    model_dir: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    phases: _Phases,
    on_progress: Progress | None,
) -> _Built:
    device = gpu_device.require()
    adopted = kernel_cache.adopt(os.environ)
    if adopted:
        LOGGER.info("%d compiled kernels taken from the image", adopted)
    # Not above: imports Triton, which a worker on a CPU need not have.
    from tilefleet_worker import fused_weights
    from tilefleet_worker.gpu_engine import GPULimits, build_runner, prompt_step_tokens

    reasons = fused_weights.why_not(model_config)
    if reasons:
        raise ConfigError(
            f"backend 'triton' cannot serve this {model_config.architecture} model: "
            f"{'; '.join(reasons)}. Use --backend cpu, or a model without."
        )
    dtype = DTYPES[config.dtype]
    size = block_bytes(model_config, config.block_size, dtype)
    host_blocks = host_blocks_for(config.kv_offloading_bytes, size, (FULL,))
    limits = GPULimits(
        config.max_batch_tokens, min(config.max_concurrent, config.max_batch_tokens),
        config.max_model_len, config.block_size, config.kv_cache_bytes, config.gpu_memory_fraction,
        config.max_concurrent, config.batch_invariant, host_blocks,
    )  # fmt: skip
    try:
        with torch.inference_mode(), Weights(model_dir, on_progress) as source:
            weights = fused_weights.load(model_config, source, config.max_model_len, dtype, device)
            phases.end("weights")
            runner, cache = build_runner(model_config, weights, limits)
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
    facts = gpu_device.facts(device)
    kinds = cache.layout.kinds
    return _Built(
        runner, cache.num_blocks, host_blocks, size, kinds, batch_invariant, facts,
        runner.graph_facts, prompt_step_tokens(model_config),
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
