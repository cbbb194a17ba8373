"""Assembles the GPU's runner: scratch memory first, the pool from what is left, then the graphs."""

import math
from dataclasses import dataclass

import torch

from tilefleet_worker import few_rows_decoder
from tilefleet_worker.attention.triton.backend import TritonAttention
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.few_rows_decoder import FewRowsDecoder
from tilefleet_worker.fused_decoder import FusedDecoder, FusedWeights, Workspace
from tilefleet_worker.gpu_runner import GPURunner
from tilefleet_worker.kernels.sampling import SamplerWorkspace
from tilefleet_worker.kv_cache import KVCache, num_blocks_for
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.step_inputs import InputBuffer

# Left free for captured graphs, library workspaces and the allocator's rounding.
MARGIN_BYTES = 2**30
# Of a token: 2,048 tokens of such a model fill an H100 for 45 ms.
_FILLING_WEIGHTS = 7e9


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


def build_runner(
    config: ModelConfig, weights: FusedWeights, limits: GPULimits
) -> tuple[GPURunner, KVCache]:
    """A runner on the device of the weights, not yet warmed up, and its pool.

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
    cache = KVCache(config, blocks, limits.block_size, dtype, device)
    decoder = _decoder(config, weights, workspace, limits.batch_invariant)
    return GPURunner(decoder, cache, attention, inputs, sampler, limits.host_blocks), cache


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
    config: ModelConfig, weights: FusedWeights, workspace: Workspace, invariant: bool
) -> FusedDecoder:
    if few_rows_decoder.why_not(weights):
        return FusedDecoder(config, weights, workspace)
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
