"""Qwen3: pre-norm decoder, grouped-query attention with normed queries and keys, gated MLP.

Source of the architecture: Qwen3 technical report (2025) and the tensor names of its checkpoints.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from tilefleet_worker.attention.base import AttentionSpec, AttentionStep
from tilefleet_worker.batch import Batch
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.layers import Linear, RMSNorm, Rotary, folded, interleave_halves
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.weights import Weights


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: Linear  # normed hidden → (heads + 2 kv_heads) · head_dim
    qk_norm: torch.Tensor  # [heads + kv_heads, head_dim]
    output: Linear  # heads · head_dim → hidden
    gate_up: Linear  # normed hidden → 2 · intermediate
    down: Linear  # intermediate → hidden


class Qwen3:
    """The whole model. Stateless between calls: what it remembers is in the KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        layers: tuple[_Layer, ...],
        head: Linear,
        rotary: Rotary,
    ) -> None:
        self._config = config
        self._embedding = embedding  # [vocabulary, hidden]
        self._layers = layers
        self._norm = RMSNorm(config.rms_norm_eps)
        self._head = head  # normed hidden → vocabulary
        self._rotary = rotary
        self._spec = AttentionSpec(scale=config.head_dim**-0.5)

    def forward(self, batch: Batch, attention: AttentionStep, cache: KVCache) -> torch.Tensor:
        """See Model.forward."""
        x = functional.embedding(batch.token_ids, self._embedding)  # [tokens, hidden]
        rotations = self._rotary.at(batch.positions)
        for index, layer in enumerate(self._layers):
            x += self._attend(layer, x, rotations, attention, cache.layer(index))
            x += self._mlp(layer, x)
        return self._head(self._norm(x[batch.last_tokens]))

    def _attend(
        self,
        layer: _Layer,
        x: torch.Tensor,
        rotations: torch.Tensor,
        attention: AttentionStep,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        config = self._config
        qkv = layer.qkv(self._norm(x)).view(len(x), -1, config.head_dim)
        value = qkv[:, -config.num_kv_heads :]
        qk = self._norm(qkv[:, : -config.num_kv_heads]) * layer.qk_norm
        qk = Rotary.rotate(qk, rotations)
        query, key = qk[:, : config.num_heads], qk[:, config.num_heads :]
        return layer.output(attention.forward(query, key, value, cache, self._spec).flatten(1))

    def _mlp(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(self._norm(x)).chunk(2, 1)
        return layer.down(functional.silu(gate) * up)


def load(config: ModelConfig, weights: Weights, max_positions: int) -> Qwen3:
    """Take all tensors. max_positions: longest sequence that will be asked for."""
    embedding = weights.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(_load_layer(config, weights, index) for index in range(config.num_layers))
    final_norm = weights.take("model.norm.weight", config.hidden_size)
    if config.tie_word_embeddings:
        head = embedding
        weights.skip("lm_head.weight")
    else:
        head = weights.take("lm_head.weight", config.vocab_size, config.hidden_size)
    rotary = Rotary(config.head_dim, config.rope_theta, max_positions)
    return Qwen3(config, embedding, layers, Linear(folded(head, final_norm)), rotary)


def _load_layer(config: ModelConfig, weights: Weights, index: int) -> _Layer:
    prefix = f"model.layers.{index}"
    hidden, inner = config.hidden_size, config.intermediate_size
    gate = weights.take(f"{prefix}.mlp.gate_proj.weight", inner, hidden)
    up = weights.take(f"{prefix}.mlp.up_proj.weight", inner, hidden)
    q_norm = weights.take(f"{prefix}.self_attn.q_norm.weight", config.head_dim)
    k_norm = weights.take(f"{prefix}.self_attn.k_norm.weight", config.head_dim)
    mlp_norm = weights.take(f"{prefix}.post_attention_layernorm.weight", hidden)
    norms = [q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1)]
    return _Layer(
        qkv=_load_qkv(config, weights, prefix),
        qk_norm=interleave_halves(torch.cat(norms)),
        output=_load_output(config, weights, f"{prefix}.self_attn.o_proj"),
        gate_up=Linear(folded(torch.cat((gate, up)), mlp_norm)),
        down=Linear(weights.take(f"{prefix}.mlp.down_proj.weight", hidden, inner)),
    )


def _load_qkv(config: ModelConfig, weights: Weights, prefix: str) -> Linear:
    """Join the three maps; queries and keys are interleaved for the rotary embedding."""
    norm = weights.take(f"{prefix}.input_layernorm.weight", config.hidden_size)
    prefix = f"{prefix}.self_attn"
    matrices, biases = [], []
    for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        rows = heads * config.head_dim
        weight = weights.take(f"{prefix}.{name}_proj.weight", rows, config.hidden_size)
        matrices.append(_interleave_rows(weight, config.head_dim))
        if config.attention_bias:
            bias = weights.take(f"{prefix}.{name}_proj.bias", rows)
            biases.append(interleave_halves(bias.view(heads, config.head_dim)).flatten())
    rows = config.num_kv_heads * config.head_dim
    matrices.append(weights.take(f"{prefix}.v_proj.weight", rows, config.hidden_size))
    if config.attention_bias:
        biases.append(weights.take(f"{prefix}.v_proj.bias", rows))
    return Linear(folded(torch.cat(matrices), norm), torch.cat(biases) if biases else None)


def _interleave_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the output rows of each head of a weight [heads · head_dim, in]."""
    by_head = weight.view(-1, head_dim, weight.shape[1]).transpose(1, 2)
    return interleave_halves(by_head).transpose(1, 2).reshape(weight.shape)


def _load_output(config: ModelConfig, weights: Weights, prefix: str) -> Linear:
    rows = config.num_heads * config.head_dim
    weight = weights.take(f"{prefix}.weight", config.hidden_size, rows)
    bias = weights.take(f"{prefix}.bias", config.hidden_size) if config.attention_bias else None
    return Linear(weight, bias)
