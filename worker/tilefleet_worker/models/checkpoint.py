"""A checkpoint as tensors of one form, whatever its family calls and stores them.

Knows names, families, quantisation and which part of each tensor a rank holds. Does not know how
the tensors are used. Vectors are fp32; what a matrix is, fp32 too or the bytes as they are stored,
is the reader's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from tilefleet_worker.dequantize import WHOLE, Cut
from tilefleet_worker.errors import ModelError
from tilefleet_worker.model_config import ExpertsConfig, ModelConfig
from tilefleet_worker.shards import Shard
from tilefleet_worker.weights import Weights

M = TypeVar("M")
"""A matrix as the reader makes it."""
MatrixReader = Callable[[str, int, int, Cut], M]
"""Called with name, rows and columns in the files, and the part to read."""
_ALL = slice(None)


def dequantizing(config: ModelConfig, weights: Weights) -> MatrixReader[torch.Tensor]:
    """Reads every matrix as fp32."""
    return lambda name, rows, columns, cut: weights.matrix(
        name, rows, columns, config.quantization, cut
    )


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
    """Reads a model's tensors one layer at a time. Every method raises ModelError.

    config: of the whole model. shard: which part of it is read; shapes below are those of the
    part. Biases of maps whose results are summed over the ranks are the first rank's.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        matrix: MatrixReader[M],
        shard: Shard = Shard(),  # noqa: B008 - frozen
    ) -> None:
        self._config = config
        self._weights = weights
        self._matrix = matrix
        self._shard = shard
        self._prefix = _prefix(config, weights)
        weights.skip_parts(config.family.other_parts)

    def embedding(self) -> torch.Tensor:
        """[vocabulary, hidden]."""
        config = self._config
        name = f"{self._prefix}.embed_tokens.weight"
        return self._weights.take(name, config.vocab_size, config.hidden_size)

    def head(self, embedding: torch.Tensor) -> torch.Tensor | M:
        """[vocabulary, hidden]: the embedding where they are tied; the rank's rows of it."""
        config = self._config
        rows = self._shard.vocabulary(config.vocab_size)
        outer = self._prefix.removesuffix("model")
        names = (f"{outer}lm_head.weight", "lm_head.weight")
        if config.tie_word_embeddings:
            for name in names:
                self._weights.skip(name)
            return embedding if self._shard.size == 1 else embedding[rows]
        name = next((name for name in names if name in self._weights), names[-1])
        return self._matrix(name, config.vocab_size, config.hidden_size, (rows, _ALL))

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return self._norm(f"{self._prefix}.norm")

    def attention(self, layer: int) -> AttentionTensors[M]:
        """The attention of a layer."""
        config, prefix = self._config, f"{self._prefix}.layers.{layer}"
        attn, hidden = f"{prefix}.self_attn", config.hidden_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        own, own_keys = self._shard.part(queries), self._shard.keys(config)
        for name in ("k_scale", "v_scale"):  # of a quantised cache, which this is not
            self._weights.skip(f"{attn}.{name}")
        family = config.family
        return AttentionTensors(
            norm=self._norm(f"{prefix}.input_layernorm"),
            query=self._matrix(f"{attn}.q_proj.weight", queries, hidden, (own, _ALL)),
            key=self._matrix(f"{attn}.k_proj.weight", keys, hidden, (own_keys, _ALL)),
            value=self._matrix(f"{attn}.v_proj.weight", keys, hidden, (own_keys, _ALL)),
            query_bias=self._bias(f"{attn}.q_proj", queries, config.qkv_bias, own),
            key_bias=self._bias(f"{attn}.k_proj", keys, config.qkv_bias, own_keys),
            value_bias=self._bias(f"{attn}.v_proj", keys, config.qkv_bias, own_keys),
            query_norm=self._norm(f"{attn}.q_norm", config.head_dim) if family.qk_norm else None,
            key_norm=self._norm(f"{attn}.k_norm", config.head_dim) if family.qk_norm else None,
            output=self._matrix(f"{attn}.o_proj.weight", hidden, queries, (_ALL, own)),
            output_bias=self._summed_bias(f"{attn}.o_proj", config.output_bias),
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
        own = self._shard.part(inner)
        return MLPTensors(
            gate=self._matrix(f"{prefix}.gate_proj.weight", inner, hidden, (own, _ALL)),
            up=self._matrix(f"{prefix}.up_proj.weight", inner, hidden, (own, _ALL)),
            down=self._matrix(f"{prefix}.down_proj.weight", hidden, inner, (_ALL, own)),
            gate_bias=self._bias(f"{prefix}.gate_proj", inner, bias, own),
            up_bias=self._bias(f"{prefix}.up_proj", inner, bias, own),
            down_bias=self._summed_bias(f"{prefix}.down_proj", bias),
        )

    def router(self, layer: int, experts: ExpertsConfig) -> M:
        """[experts, hidden]."""
        names = self._config.family.experts
        router = names.router if names else ""
        name = f"{self._prefix}.layers.{layer}.{router}.weight"
        return self._matrix(name, experts.count, self._config.hidden_size, WHOLE)

    def expert(self, layer: int, expert: int) -> MLPTensors[M]:
        """One expert of a sparse layer."""
        names, experts = self._config.family.experts, self._config.experts
        if names is None or experts is None:
            raise ModelError(f"{self._config.family.title} has no experts.")
        prefix = f"{self._prefix}.layers.{layer}.{names.experts}.{expert}"
        hidden, inner = self._config.hidden_size, experts.intermediate_size
        own = self._shard.part(inner)
        return MLPTensors(
            gate=self._matrix(f"{prefix}.{names.gate}.weight", inner, hidden, (own, _ALL)),
            up=self._matrix(f"{prefix}.{names.up}.weight", inner, hidden, (own, _ALL)),
            down=self._matrix(f"{prefix}.{names.down}.weight", hidden, inner, (_ALL, own)),
        )

    def _bias(self, name: str, rows: int, wanted: bool, own: slice = _ALL) -> torch.Tensor | None:
        return self._weights.take(f"{name}.bias", rows, part=(own,)) if wanted else None

    def _summed_bias(self, name: str, wanted: bool) -> torch.Tensor | None:
        """The bias of a map whose results are summed over the ranks: one of them adds it."""
        bias = self._bias(name, self._config.hidden_size, wanted)
        return bias if self._shard.rank == 0 else None

    def _norm(self, name: str, features: int = 0) -> torch.Tensor:
        weight = self._weights.take(f"{name}.weight", features or self._config.hidden_size)
        return weight + self._config.family.norm_offset


def _prefix(config: ModelConfig, weights: Weights) -> str:
    """What stands before the names of the text model's tensors in these files."""
    prefixes = config.family.prefixes
    found = (prefix for prefix in prefixes if f"{prefix}.embed_tokens.weight" in weights)
    return next(found, prefixes[0])
