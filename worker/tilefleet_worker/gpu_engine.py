"""Assembles the GPU's runner: scratch memory first, the pool from what is left, then the graphs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tilefleet_worker import few_rows_decoder, fused_weights
from tilefleet_worker.attention.triton.backend import TritonAttention
from tilefleet_worker.collectives import Collectives
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.few_rows_decoder import FewRowsDecoder
from tilefleet_worker.fused_decoder import FusedDecoder, FusedWeights, Workspace
from tilefleet_worker.gpu_runner import GPURunner
from tilefleet_worker.kernels.sampling import SamplerWorkspace
from tilefleet_worker.kv_cache import KVCache, block_bytes, host_blocks_for, num_blocks_for
from tilefleet_worker.layer_kinds import FULL
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.rank_group import RankGroup
from tilefleet_worker.shards import Shard
from tilefleet_worker.step_inputs import InputBuffer
from tilefleet_worker.weights import Progress, Weights

# Left free for captured graphs, library workspaces and the allocator's rounding.
MARGIN_BYTES = 2**30
# Of a token: 2,048 tokens of such a model fill an H100 for 45 ms.
_FILLING_WEIGHTS = 7e9


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class GPULimits:
    """What the runner is built for. kv_cache_bytes 0: what the device has left.

    max_slots: requests that hold KV blocks; 0: max_rows.
    batch_invariant: decodes of up to 256 rows get the bits that they get alone, where possible.
    host_blocks: blocks of host memory for evicted prefixes.
    """

    max_batch_tokens: int
    max_rows: int
    max_context: int
    block_size: int
    kv_cache_bytes: int = 0
    memory_fraction: float = 0.92
    max_slots: int = 0
    batch_invariant: bool = True
    host_blocks: int = 0


def load_gpu(
    model_dir: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    device: torch.device,
    collectives: Collectives | None = None,
    ranks: RankGroup | None = None,
    *,
    after_weights: Callable[[], None],
    on_progress: Progress | None = None,
) -> tuple[GPURunner, KVCache]:
    """Load a rank's part of a model onto its GPU: a runner, not yet warmed up, and its pool.

    config: resolved, with the pool's bytes over all ranks. collectives, ranks: see build_runner.
    after_weights: called between weights and pool. Raises ConfigError and ModelError when the model
    cannot be served so, and torch's OutOfMemoryError.
    """
    reasons = fused_weights.why_not(model_config)
    if reasons:
        raise ConfigError(
            f"backend 'triton' cannot serve this {model_config.architecture} model: "
            f"{'; '.join(reasons)}. Use --backend cpu, or a model without."
        )
    shard = Shard() if collectives is None else Shard(collectives.rank, collectives.size)
    own, dtype = shard.config(model_config), DTYPES[config.dtype]
    size = block_bytes(own, config.block_size, dtype)
    host_blocks = host_blocks_for(config.kv_offloading_bytes, size, (FULL,))
    limits = GPULimits(
        config.max_batch_tokens, min(config.max_concurrent, config.max_batch_tokens),
        config.max_model_len, config.block_size, config.kv_cache_bytes // shard.size,
        config.gpu_memory_fraction, config.max_concurrent, config.batch_invariant, host_blocks,
    )  # fmt: skip
    with (
        torch.inference_mode(),
        Weights(model_dir, on_progress, verify=shard.rank == 0) as source,
    ):
        weights = fused_weights.load(
            model_config, source, config.max_model_len, dtype, device, shard
        )
        after_weights()
        return build_runner(own, weights, limits, collectives, ranks)


def build_runner(
    config: ModelConfig,
    weights: FusedWeights,
    limits: GPULimits,
    collectives: Collectives | None = None,
    ranks: RankGroup | None = None,
) -> tuple[GPURunner, KVCache]:
    """A runner on the device of the weights, not yet warmed up, and its pool.

    collectives: of the ranks that hold the parts of a model. ranks: those that this one, the first,
    tells its steps. The pool has as many blocks as fit on every rank.

    Raises ConfigError when attention cannot serve the model or the pool would have no blocks.
    """
    device, dtype = weights.embedding.device, weights.embedding.dtype
    attention = TritonAttention(config, limits.max_rows, limits.max_context, device)
    reasons = attention.why_not()
    if reasons:
        raise ConfigError(f"backend 'triton' cannot serve this model: {'; '.join(reasons)}.")
    max_logits = limits.max_rows
    workspace = Workspace(config, limits.max_batch_tokens, max_logits, dtype, device)
    max_blocks = -(-limits.max_context // limits.block_size)
    slots = max(limits.max_rows, limits.max_slots)
    sampler = SamplerWorkspace(config.vocab_size, limits.max_rows, slots, device)
    inputs = InputBuffer(
        limits.max_batch_tokens, limits.max_rows, max_blocks, attention.prefill_tile.rows,
        sampler.newest,
    )  # fmt: skip
    pool_bytes = _pool_bytes(limits, device)
    blocks = num_blocks_for(config, limits.block_size, pool_bytes, dtype)
    if collectives is not None:
        blocks = collectives.least(blocks)
    on_scrub = None if ranks is None else ranks.scrub
    cache = KVCache(config, blocks, limits.block_size, dtype, device, on_scrub=on_scrub)
    decoder = _decoder(config, weights, workspace, limits.batch_invariant, collectives)
    return (
        GPURunner(decoder, cache, attention, inputs, sampler, limits.host_blocks, ranks),
        cache,
    )


def prompt_step_tokens(config: ModelConfig) -> int:
    """Tokens of prompts that fill a GPU for long enough to hide the launches of a step. Pure.

    Of the 8B shape 2,048 take 47 ms on an H100, at the rate of any larger number; the launches take
    the host 13 ms, and 11 for the 0.6B shape, where as many tokens take 5. A power of two.
    """
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    inner = config.intermediate_size
    if config.experts is not None:
        inner = config.experts.chosen * config.experts.intermediate_size
    weights = config.num_layers * config.hidden_size * (2 * heads + 3 * inner)
    times = 1 << max(0, round(math.log2(_FILLING_WEIGHTS / weights)))
    return min(times, 4) * 2048


def _decoder(
    config: ModelConfig,
    weights: FusedWeights,
    workspace: Workspace,
    invariant: bool,
    collectives: Collectives | None,
) -> FusedDecoder:
    # The way for few rows adds a product to the stream as it is made: no place for other ranks'.
    if collectives is not None or few_rows_decoder.why_not(weights):
        return FusedDecoder(config, weights, workspace, collectives)
    return FewRowsDecoder(config, weights, workspace, invariant)


def _pool_bytes(limits: GPULimits, device: torch.device) -> int:
    """Bytes of the pool: those asked for, if they are free, or all that may still be taken."""
    if device.type != "cuda":
        if not limits.kv_cache_bytes:
            raise ConfigError("kv_cache_bytes is 0: give the pool's size, a CPU's is not measured.")
        return limits.kv_cache_bytes
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return pool_bytes(limits.kv_cache_bytes, limits.memory_fraction, free, total)


def pool_bytes(wanted: int, fraction: float, free: int, total: int) -> int:
    """Size of the KV pool on a device with `free` of `total` bytes left. Pure.

    wanted 0: fraction · total − used − margin. Raises ConfigError when nothing is left, and when
    what is wanted is not free.
    """
    gib = 2**30
    if wanted:
        if wanted > free - MARGIN_BYTES:
            raise ConfigError(
                f"--kv-cache-memory asks for {wanted / gib:.1f} GiB, but {free / gib:.1f} GiB of "
                f"the GPU's {total / gib:.1f} are free after the weights, and "
                f"{MARGIN_BYTES / gib:.0f} GiB must stay free: lower it, or leave it out."
            )
        return wanted
    left = int(free - (1.0 - fraction) * total) - MARGIN_BYTES
    if left <= 0:
        raise ConfigError(
            f"Nothing is left for the KV pool: {(total - free) / gib:.1f} of the GPU's "
            f"{total / gib:.1f} GiB are taken, and --gpu-memory-fraction allows {fraction}: raise "
            "it, lower --max-batch-tokens, end other processes on the GPU, or take a larger GPU."
        )
    return left
