"""The decoder of a GPU: matrix products from the vendor's library, all else in fused kernels.

A layer is nine launches: product, rotary and store, attention, product, norm, product, SwiGLU,
product, norm. Steps of few rows go another way where they can: few_rows_decoder. Every
intermediate lives in memory that is allocated once, so a step allocates nothing and a captured
graph stays valid.
"""

from dataclasses import dataclass

import torch

from tilefleet_worker.attention.base import AttentionSpec
from tilefleet_worker.attention.triton.backend import PagedBatch, TritonAttention
from tilefleet_worker.collectives import Collectives
from tilefleet_worker.kernels.embedding import embed
from tilefleet_worker.kernels.mixture import ExpertWeights, MixtureShape, MixtureSpace, mixture
from tilefleet_worker.kernels.norm import add_rms_norm
from tilefleet_worker.kernels.rotary_store import Rotation, rotary_store
from tilefleet_worker.kernels.routing import Router
from tilefleet_worker.kernels.scaled_matrix import ScaledMatrix
from tilefleet_worker.kernels.scaled_product import scaled_product
from tilefleet_worker.kernels.swiglu import swiglu
from tilefleet_worker.kernels.weight_tiles import Matrix
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Weights of one layer as a checkpoint has them; the input maps and the gates joined."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Matrix  # [(heads + 2 kv_heads) · head_dim, hidden]
    qkv_bias: torch.Tensor | None
    rotation: Rotation
    spec: AttentionSpec
    output: Matrix  # [hidden, heads · head_dim]
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: Matrix  # [2 · intermediate, hidden]; with a router one an expert
    down: Matrix  # [hidden, intermediate]; with a router one an expert
    router: Router | None = None


@dataclass(frozen=True, slots=True)
class FusedWeights:
    """All weights of a decoder, on the device."""

    embedding: torch.Tensor  # [vocabulary, hidden]
    layers: tuple[FusedLayer, ...]
    final_norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocabulary, hidden]; may be the embedding


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step on the device. All tensors int32."""

    token_ids: torch.Tensor  # [tokens]; -1 - slot: the newest token of that slot
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens]: block · block_size + place; -1: store nothing
    paged: PagedBatch
    logits_index: torch.Tensor | None  # tokens whose logits are wanted; None: all
    newest: torch.Tensor  # [slots]: the token last chosen for each
    samples: torch.Tensor  # [samples, words]: what the sampler reads; the decoder does not


class Workspace:
    """Every intermediate of a step, for up to max_tokens tokens and max_logits logits."""

    def __init__(
        self,
        config: ModelConfig,
        max_tokens: int,
        max_logits: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = config.num_heads * config.head_dim
        joined = heads + 2 * config.num_kv_heads * config.head_dim

        def rows(features: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(max_tokens, features, dtype=kind, device=device)

        self.max_tokens = max_tokens
        self.residual = rows(config.hidden_size, torch.float32)
        self.normed = rows(config.hidden_size)
        self.delta = rows(config.hidden_size)
        self.qkv = rows(joined)
        self.query = rows(heads)
        self.attended = rows(heads)
        dense = config.experts is None or not all(config.sparse_layers)
        inner = config.intermediate_size if dense else 0
        self.gate_up = rows(2 * inner)
        self.activated = rows(inner)
        self.mixture = _mixture_space(config, max_tokens, dtype, device)
        self.logits = torch.empty(max_logits, config.vocab_size, dtype=torch.float32, device=device)


def _mixture_space(
    config: ModelConfig, max_tokens: int, dtype: torch.dtype, device: torch.device
) -> MixtureSpace | None:
    experts = config.experts
    if experts is None:
        return None
    shape = MixtureShape(
        experts.count, experts.chosen, config.hidden_size, experts.intermediate_size
    )
    return MixtureSpace(shape, max_tokens, dtype, device)


class FusedDecoder:
    """A decoder with gated MLPs or mixtures of them.

    Stateless between steps but for its scratch memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: FusedWeights,
        workspace: Workspace,
        collectives: Collectives | None = None,
    ) -> None:
        """collectives: of the ranks that hold the parts of a model; config: of this rank's part."""
        self._collectives = collectives
        self.config = config
        self.weights = weights
        self.workspace = workspace

    def forward(
        self, inputs: StepInputs, attention: TritonAttention, cache: KVCache
    ) -> torch.Tensor:
        """Logits fp32 [wanted, vocabulary]. Launches only; never waits for the device."""
        space, weights = self.workspace, self.weights
        tokens = len(inputs.token_ids)
        residual, normed = space.residual[:tokens], space.normed[:tokens]
        self.embed(inputs, residual)
        delta = None
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(weights.layers):
            add_rms_norm(residual, delta, layer.input_norm, normed, eps)
            delta = self._summed(self._attend(layer, inputs, attention, cache.layer(index)))
            add_rms_norm(residual, delta, layer.mlp_norm, normed, eps)
            delta = self._summed(self._mlp(layer, tokens))
        if inputs.logits_index is not None and delta is not None:
            residual, delta = residual[inputs.logits_index], delta[inputs.logits_index]
        last = space.normed[: len(residual)]
        add_rms_norm(residual, delta, weights.final_norm, last, eps)
        return self._head(last, self.logits_space(len(last)))

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        return part if self._collectives is None else self._collectives.add_up(part)

    def _head(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits of x. Every rank gets those of all, so that each chooses the same tokens."""
        head = self.weights.head
        if self._collectives is None:
            return _logits(x, head, out)
        if not len(x):
            return out
        part = out.new_empty(len(x), len(head))
        return self._collectives.columns(_logits(x, head, part), self.config.vocab_size, out)

    def embed(self, inputs: StepInputs, residual: torch.Tensor) -> None:
        """Begin the residual stream fp32 [tokens, hidden] with the embeddings of the tokens."""
        embed(inputs.token_ids, inputs.newest, self.weights.embedding, residual)

    def logits_space(self, rows: int) -> torch.Tensor:
        """Memory for logits fp32 [rows, vocabulary]: static, or new when a prompt is scored."""
        space = self.workspace.logits
        if rows <= len(space):
            return space[:rows]
        return torch.empty(rows, space.shape[1], dtype=space.dtype, device=space.device)

    def _attend(
        self,
        layer: FusedLayer,
        inputs: StepInputs,
        attention: TritonAttention,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        space, tokens = self.workspace, len(inputs.token_ids)
        qkv = _linear(space.normed[:tokens], layer.qkv, layer.qkv_bias, space.qkv[:tokens])
        attended = self.attended(qkv, layer, inputs, attention, cache)
        return _linear(attended, layer.output, layer.output_bias, space.delta[:tokens])

    def attended(
        self,
        qkv: torch.Tensor,
        layer: FusedLayer,
        inputs: StepInputs,
        attention: TritonAttention,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """Attention [tokens, heads · head_dim] of projected queries, keys and values."""
        space, tokens = self.workspace, len(inputs.token_ids)
        shape = (tokens, self.config.num_heads, self.config.head_dim)
        query = rotary_store(
            qkv, inputs.positions, inputs.slots, layer.rotation,
            space.query[:tokens].view(shape), cache,
        )  # fmt: skip
        attended = space.attended[:tokens]
        attention.attend(query, cache, attended.view(shape), inputs.paged, layer.spec)
        return attended

    def _mlp(self, layer: FusedLayer, tokens: int) -> torch.Tensor:
        space = self.workspace
        if layer.router is not None and space.mixture is not None:
            experts = ExpertWeights(layer.router, layer.gate_up, layer.down)
            return mixture(space.normed[:tokens], experts, space.mixture, space.delta[:tokens])
        gate_up = _linear(space.normed[:tokens], layer.gate_up, None, space.gate_up[:tokens])
        activated = swiglu(gate_up, space.activated[:tokens])
        return _linear(activated, layer.down, None, space.delta[:tokens])


def _linear(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """out = x weightᵀ + bias."""
    if isinstance(weight, ScaledMatrix):
        return scaled_product(x, weight, bias, out)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _logits(x: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Logits in fp32 from the product's fp32 sums: bf16 would round close ones into ties."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.ops.aten.mm.dtype_out(x, head.t(), torch.float32, out=out)  # type: ignore[no-any-return]
    return out.copy_(torch.mm(x, head.t()))
