"""Models by architecture. A new one is a module with `load` and a line in model_config."""

from importlib import import_module
from typing import Protocol

import torch

from tilefleet_worker.attention.base import AttentionStep
from tilefleet_worker.batch import Batch
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.model_config import ARCHITECTURES, ModelConfig
from tilefleet_worker.weights import Weights


class Model(Protocol):
    """A decoder that keeps its keys and values in a KVCache."""

    def forward(self, batch: Batch, attention: AttentionStep, cache: KVCache) -> torch.Tensor:
        """Logits fp32 [sampled rows, vocabulary] of the last token of each sampled row."""
        ...


def load(config: ModelConfig, weights: Weights, max_positions: int) -> Model:
    """Build the model of `config` from its weights. Raises ModelError when they do not fit."""
    module = import_module(f"tilefleet_worker.models.{ARCHITECTURES[config.architecture]}")
    model: Model = module.load(config, weights, max_positions)
    weights.check_all_taken()
    return model
