"""Fills Triton's cache with the kernels that a model runs, without a GPU.

The engine's own code runs, on tensors without memory and a driver that only compiles, so each kernel
has the constants, types and options of a real step, and with them the key that Triton looks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from tilefleet_worker import fused_weights
from tilefleet_worker.compilation.shape_weights import META, ShapeWeights
from tilefleet_worker.compilation.target_driver import CompilingDriver
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.gpu_engine import GPULimits, build_runner
from tilefleet_worker.gpu_runner import probe
from tilefleet_worker.graphs import padded_sizes
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.step import StepPlan

# Triton on AMD distinguishes tensors of 2 GiB or more, which a pool on a GPU always is.
_POOL_BYTES = 16 * 2**30
_BINARIES = (".hsaco", ".cubin")


@dataclass(frozen=True, slots=True)
class Built:
    """Kernels of one model and architecture."""

    needed: int
    compiled: int
    """Of those, how many the cache did not have."""


def build(
    arch: str, config: ModelConfig, options: EngineConfig, dtype: torch.dtype, cache: Path
) -> Built:
    """Run every kind of step of the model into the cache, which Triton must already use.

    options: resolved. Raises ModelError or ConfigError when the GPU's engine cannot serve the model.
    """
    before = _entries(cache)
    used: list[object] = []
    driver = triton.runtime.driver
    driver.set_active(CompilingDriver(arch))
    kept = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **found: used.append(found)
    try:
        _run_steps(_fewest_layers(config), options, dtype)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = kept
    return Built(len(used), len(_entries(cache) - before))


def _run_steps(config: ModelConfig, options: EngineConfig, dtype: torch.dtype) -> None:
    rows = min(options.max_concurrent, options.max_batch_tokens)
    limits = GPULimits(
        options.max_batch_tokens, rows, options.max_model_len, options.block_size, _POOL_BYTES,
        batch_invariant=options.batch_invariant,
    )  # fmt: skip
    with torch.inference_mode():
        weights = fused_weights.load(config, ShapeWeights(), options.max_model_len, dtype, META)
        runner, _ = build_runner(config, weights, limits)
        for plan in _plans(options, rows):
            runner.logits(plan)


def _plans(options: EngineConfig, max_rows: int) -> Iterator[StepPlan]:
    """Decodes of every padded size, and one prompt of 2, 4, 8 … tokens."""
    for rows in padded_sizes(max_rows):
        yield StepPlan.of((probe(0, (0,), (0,)),) * rows)
    longest = min(options.max_batch_tokens, options.max_model_len)
    lengths = [2**power for power in range(1, longest.bit_length()) if 2**power < longest]
    for length in (*lengths, longest):
        blocks = (0,) * -(-length // options.block_size)
        yield StepPlan.of((probe(0, (0,) * length, blocks),))


def _fewest_layers(config: ModelConfig) -> ModelConfig:
    """One layer of each kind: the others run the same kernels."""
    sparse = config.sparse_layers or (False,) * config.num_layers
    kinds = list(zip(config.windows, config.ropes, sparse, strict=True))
    distinct = list(dict.fromkeys(kinds))
    windows, ropes, sparse = (tuple(part) for part in zip(*distinct, strict=True))
    return replace(
        config, num_layers=len(distinct), windows=windows, ropes=ropes, sparse_layers=sparse
    )


def _entries(cache: Path) -> set[Path]:
    return {path for path in cache.glob("*/*") if path.suffix in _BINARIES}
