"""A checkpoint as tensors of one form, whatever its family calls and stores them.

Knows names, families and quantisation. Does not know how the tensors are used. Vectors are fp32;
what a matrix is, fp32 too or the bytes as they are stored, is the reader's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from tilefleet_worker.errors import ModelError
from tilefleet_worker.model_config import ExpertsConfig, ModelConfig
from tilefleet_worker.weights import Weights

M = TypeVar("M")
"""A matrix as the reader makes it."""
MatrixReader = Callable[[str, int, int], M]
"""Called with name, rows and columns."""


def dequantizing(config: ModelConfig, weights: Weights) -> MatrixReader[torch.Tensor]:
    """Reads every matrix as fp32."""
    return lambda name, rows, columns: weights.matrix(name, rows, columns, config.quantization)


@dataclass(frozen=True, slots=True)
class AttentionTensors(Generic[M]):
    """One layer's attention. Norm weights are those that multiply."""

    norm: torch.Tensor  # [hidden]
    query: M  # [heads · head_dim, hidden]
    key: M  # [kv_heads · head_dim, hidden]
    value: M
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None
    query_norm: torch.Tensor | None  # [head_dim]
    key_norm: torch.Tensor | None
    output: M  # [hidden, heads · head_dim]
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor | None  # [hidden], of the output


@dataclass(frozen=True, slots=True)
class MLPTensors(Generic[M]):
    """A gated MLP, or one expert."""

    gate: M  # [intermediate, hidden]
    up: M
    down: M  # [hidden, intermediate]
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class Checkpoint(Generic[M]):
    """Reads a model's tensors one layer at a time. Every method raises ModelError."""

    def __init__(self, config: ModelConfig, weights: Weights, matrix: MatrixReader[M]) -> None:
        self._config = config
        self._weights = weights
        self._matrix = matrix
        self._prefix = _prefix(config, weights)
        weights.skip_parts(config.family.other_parts)

    def embedding(self) -> torch.Tensor:
        """[vocabulary, hidden]."""
        config = self._config
        name = f"{self._prefix}.embed_tokens.weight"
        return self._weights.take(name, config.vocab_size, config.hidden_size)

    def head(self, embedding: torch.Tensor) -> torch.Tensor | M:
        """[vocabulary, hidden]: the embedding where they are tied."""
        config = self._config
        outer = self._prefix.removesuffix("model")
        names = (f"{outer}lm_head.weight", "lm_head.weight")
        if config.tie_word_embeddings:
            for name in names:
                self._weights.skip(name)
            return embedding
        name = next((name for name in names if name in self._weights), names[-1])
        return self._matrix(name, config.vocab_size, config.hidden_size)

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return self._norm(f"{self._prefix}.norm")

    def attention(self, layer: int) -> AttentionTensors[M]:
        """The attention of a layer."""
        config, prefix = self._config, f"{self._prefix}.layers.{layer}"
        attn, hidden = f"{prefix}.self_attn", config.hidden_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for name in ("k_scale", "v_scale"):  # of a quantised cache, which this is not
            self._weights.skip(f"{attn}.{name}")
        family = config.family
        return AttentionTensors(
            norm=self._norm(f"{prefix}.input_layernorm"),
            query=self._matrix(f"{attn}.q_proj.weight", queries, hidden),
            key=self._matrix(f"{attn}.k_proj.weight", keys, hidden),
            value=self._matrix(f"{attn}.v_proj.weight", keys, hidden),
            query_bias=self._bias(f"{attn}.q_proj", queries, config.qkv_bias),
            key_bias=self._bias(f"{attn}.k_proj", keys, config.qkv_bias),
            value_bias=self._bias(f"{attn}.v_proj", keys, config.qkv_bias),
            query_norm=self._norm(f"{attn}.q_norm", config.head_dim) if family.qk_norm else None,
            key_norm=self._norm(f"{attn}.k_norm", config.head_dim) if family.qk_norm else None,
            output=self._matrix(f"{attn}.o_proj.weight", hidden, queries),
            output_bias=self._bias(f"{attn}.o_proj", hidden, config.output_bias),
            post_norm=(
                self._norm(f"{prefix}.post_attention_layernorm") if family.sandwich_norms else None
            ),
        )

    def mlp_norms(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Norm of the MLP's input, and of its output where the family has one."""
        prefix = f"{self._prefix}.layers.{layer}"
        if not self._config.family.sandwich_norms:
            return self._norm(f"{prefix}.post_attention_layernorm"), None
        after = self._norm(f"{prefix}.post_feedforward_layernorm")
        return self._norm(f"{prefix}.pre_feedforward_layernorm"), after

    def mlp(self, layer: int) -> MLPTensors[M]:
        """The MLP of a dense layer."""
        prefix, bias = f"{self._prefix}.layers.{layer}.mlp", self._config.mlp_bias
        hidden, inner = self._config.hidden_size, self._config.intermediate_size
        return MLPTensors(
            gate=self._matrix(f"{prefix}.gate_proj.weight", inner, hidden),
            up=self._matrix(f"{prefix}.up_proj.weight", inner, hidden),
            down=self._matrix(f"{prefix}.down_proj.weight", hidden, inner),
            gate_bias=self._bias(f"{prefix}.gate_proj", inner, bias),
            up_bias=self._bias(f"{prefix}.up_proj", inner, bias),
            down_bias=self._bias(f"{prefix}.down_proj", hidden, bias),
        )

    def router(self, layer: int, experts: ExpertsConfig) -> M:
        """[experts, hidden]."""
        names = self._config.family.experts
        router = names.router if names else ""
        name = f"{self._prefix}.layers.{layer}.{router}.weight"
        return self._matrix(name, experts.count, self._config.hidden_size)

    def expert(self, layer: int, expert: int, experts: ExpertsConfig) -> MLPTensors[M]:
        """One expert of a sparse layer."""
        names = self._config.family.experts
        if names is None:
            raise ModelError(f"{self._config.family.title} has no experts.")
        prefix = f"{self._prefix}.layers.{layer}.{names.experts}.{expert}"
        hidden, inner = self._config.hidden_size, experts.intermediate_size
        return MLPTensors(
            gate=self._matrix(f"{prefix}.{names.gate}.weight", inner, hidden),
            up=self._matrix(f"{prefix}.{names.up}.weight", inner, hidden),
            down=self._matrix(f"{prefix}.{names.down}.weight", hidden, inner),
        )

    def _bias(self, name: str, rows: int, wanted: bool) -> torch.Tensor | None:
        return self._weights.take(f"{name}.bias", rows) if wanted else None

    def _norm(self, name: str, features: int = 0) -> torch.Tensor:
        weight = self._weights.take(f"{name}.weight", features or self._config.hidden_size)
        return weight + self._config.family.norm_offset


def _prefix(config: ModelConfig, weights: Weights) -> str:
    """What stands before the names of the text model's tensors in these files."""
    prefixes = config.family.prefixes
    found = (prefix for prefix in prefixes if f"{prefix}.embed_tokens.weight" in weights)
    return next(found, prefixes[0])
