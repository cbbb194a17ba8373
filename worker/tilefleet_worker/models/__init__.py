"""Models: one decoder, described by its config and its family."""

from collections.abc import Sequence
from typing import Protocol

import torch

from tilefleet_worker.attention.base import AttentionStep
from tilefleet_worker.batch import Batch
from tilefleet_worker.collectives import Collectives
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.layers import Placement
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.models.checkpoint import Checkpoint, dequantizing
from tilefleet_worker.models.loading import load_decoder
from tilefleet_worker.shards import Shard
from tilefleet_worker.weights import Weights


class Model(Protocol):
    """A decoder that keeps its keys and values in a KVCache."""

    def forward(
        self, batch: Batch, attention: Sequence[AttentionStep], cache: KVCache
    ) -> torch.Tensor:
        """Logits fp32 [logits, vocabulary] of the tokens that the batch wants them of.

        attention: one step for each group of layers of the cache's layout.
        """
        ...


def load(
    config: ModelConfig,
    weights: Weights,
    max_positions: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    collectives: Collectives | None = None,
) -> Model:
    """Build the model of `config` from its weights, on a device and in a type.

    max_positions: longest sequence that will be asked for. collectives: of the ranks that compute
    it together; each reads and holds its part. Raises ModelError when the files do not hold exactly
    what the model needs, ConfigError when it cannot be divided by the number of ranks.
    """
    place = Placement(torch.device(device), dtype)
    shard = Shard() if collectives is None else Shard(collectives.rank, collectives.size)
    checkpoint = Checkpoint(config, weights, dequantizing(config, weights), shard)
    own = shard.config(config)
    model = load_decoder(own, checkpoint, max_positions, place, collectives)
    weights.check_all_taken()
    return model
