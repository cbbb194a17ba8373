"""The decoder that all families share: pre-norm attention and MLP around one stream.

What differs between families is data: ModelConfig, and which tensors are there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from tilefleet_worker.attention.base import AttentionSpec, AttentionStep
from tilefleet_worker.batch import Batch
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.layers import Linear, RMSNorm, Rotary
from tilefleet_worker.model_config import ModelConfig

Map = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] → [rows, out]: a Linear, or one that the ranks of a group compute together."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. Heads of queries and keys are interleaved, see layers.interleave_halves."""

    norm: RMSNorm
    qkv: Linear  # normed hidden → (heads + 2 kv_heads) · head_dim
    qk_norm: torch.Tensor | None  # [heads + kv_heads, head_dim], in the model's type
    rope: int  # which of the model's rotary embeddings
    spec: AttentionSpec
    output: Map  # heads · head_dim → hidden
    output_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: Map
    mlp_output_norm: RMSNorm | None


@dataclass(frozen=True, slots=True)
class Ends:
    """What stands before and after the layers."""

    embedding: torch.Tensor  # [vocabulary, hidden]
    embedding_scale: float
    norm: RMSNorm
    head: Map  # normed hidden → vocabulary


class Decoder:
    """The whole model. Stateless between calls: what it remembers is in the KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        ends: Ends,
        layers: tuple[Layer, ...],
        rotaries: tuple[Rotary, ...],
    ) -> None:
        self._config = config
        self._ends = ends
        self._layers = layers
        self._rotaries = rotaries
        self._head_norm = RMSNorm(config.rms_norm_eps)

    def forward(
        self, batch: Batch, attention: Sequence[AttentionStep], cache: KVCache
    ) -> torch.Tensor:
        """See Model.forward."""
        x = functional.embedding(batch.token_ids, self._ends.embedding)  # [tokens, hidden]
        if self._ends.embedding_scale != 1.0:
            x = x * self._ends.embedding_scale
        rotations = [rotary.at(batch.positions) for rotary in self._rotaries]
        for index, layer in enumerate(self._layers):
            step = attention[cache.layout.tables[index]]
            x += self._attend(layer, x, rotations[layer.rope], step, cache.layer(index))
            x += self._feed(layer, x)
        logits = self._ends.head(self._ends.norm(x[batch.last_tokens])).float()
        return self._capped(logits)

    def _attend(
        self,
        layer: Layer,
        x: torch.Tensor,
        rotations: torch.Tensor,
        attention: AttentionStep,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        config = self._config
        qkv = layer.qkv(layer.norm(x)).view(len(x), -1, config.head_dim)
        qk, value = qkv[:, : -config.num_kv_heads], qkv[:, -config.num_kv_heads :]
        if layer.qk_norm is not None:
            qk = self._head_norm(qk) * layer.qk_norm
        qk = Rotary.rotate(qk, rotations)
        query, key = qk[:, : config.num_heads], qk[:, config.num_heads :]
        attended = attention.forward(query, key, value, cache, layer.spec)
        made = layer.output(attended.flatten(1))
        return made if layer.output_norm is None else layer.output_norm(made)

    @staticmethod
    def _feed(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        made = layer.mlp(layer.mlp_norm(x))
        return made if layer.mlp_output_norm is None else layer.mlp_output_norm(made)

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        """cap · tanh(logits / cap), a row at a time: bits at the end of a vector depend on it."""
        cap = self._config.logits_soft_cap
        if cap:
            for row in logits:
                row.div_(cap).tanh_().mul_(cap)
        return logits
