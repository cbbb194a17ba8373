"""One rank's model, pool and attention on a CPU: a whole model's where there is one rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tilefleet_worker import attention, models
from tilefleet_worker.attention.base import AttentionBackend
from tilefleet_worker.collectives import Collectives
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.kv_cache import KVCache, block_bytes, num_blocks_for
from tilefleet_worker.layer_kinds import CacheLayout
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.models import Model
from tilefleet_worker.shards import Shard
from tilefleet_worker.weights import Progress, Weights


@dataclass(frozen=True, slots=True)
class CPUParts:
    """What a rank computes with. block_bytes: of its part of a block."""

    model: Model
    cache: KVCache
    attention: AttentionBackend
    block_bytes: int


def load_cpu(
    model_dir: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    collectives: Collectives | None = None,
    *,
    after_weights: Callable[[], None],
    on_progress: Progress | None = None,
    on_scrub: Callable[[Sequence[int]], None] | None = None,
) -> CPUParts:
    """Load a rank's part. config: resolved, with the pool's bytes over all ranks.

    after_weights: called between weights and pool. on_scrub: see KVCache. Raises ModelError and
    ConfigError when the model cannot be served so.
    """
    rank, size = (0, 1) if collectives is None else (collectives.rank, collectives.size)
    own = Shard(rank, size).config(model_config)
    backend = attention.create(config.backend, own)
    layout = CacheLayout.of(own.windows, config.max_model_len)
    num_bytes = block_bytes(own, config.block_size, layout=layout)
    num_blocks = num_blocks_for(
        own, config.block_size, config.kv_cache_bytes // size, layout=layout
    )
    with torch.inference_mode(), Weights(model_dir, on_progress, verify=rank == 0) as weights:
        model = models.load(model_config, weights, config.max_model_len, collectives=collectives)
    after_weights()
    cache = KVCache(own, num_blocks, config.block_size, layout=layout, on_scrub=on_scrub)
    return CPUParts(model, cache, backend, num_bytes)
