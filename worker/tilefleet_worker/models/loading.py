"""From a checkpoint to a decoder: maps joined, norms folded, heads interleaved, tensors placed."""

import torch
from torch.nn import functional

from tilefleet_worker.attention.base import AttentionSpec
from tilefleet_worker.collectives import Collectives, JoinedHead, Summed
from tilefleet_worker.layers import (
    Linear,
    Placement,
    RMSNorm,
    Rotary,
    interleave_halves,
    normed_linear,
)
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.models.checkpoint import AttentionTensors, Checkpoint, MLPTensors
from tilefleet_worker.models.decoder import Decoder, Ends, Layer, Map
from tilefleet_worker.models.mlp import Experts, FeedForward, GatedMLP, activation


def load_decoder(
    config: ModelConfig,
    checkpoint: Checkpoint[torch.Tensor],
    max_positions: int,
    place: Placement,
    collectives: Collectives | None = None,
) -> Decoder:
    """Take all tensors. max_positions: longest sequence that will be asked for.

    config: of the part that this rank computes; collectives: of the ranks where there are several.
    """
    kinds = tuple(dict.fromkeys(config.ropes))
    rotaries = tuple(Rotary(config.head_dim, kind, max_positions, place.device) for kind in kinds)
    loader = _Loader(config, checkpoint, place, collectives)
    embedding = checkpoint.embedding()
    layers = tuple(
        loader.layer(index, kinds.index(config.ropes[index])) for index in range(config.num_layers)
    )
    final_norm = checkpoint.final_norm()
    norm, head = loader.head(final_norm, checkpoint.head(embedding))
    scale = config.hidden_size**0.5 if config.family.scaled_embedding else 1.0
    return Decoder(config, Ends(place.put(embedding), scale, norm, head), layers, rotaries)


class _Loader:
    """Builds layers of one model."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint[torch.Tensor],
        place: Placement,
        collectives: Collectives | None,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._place = place
        self._collectives = collectives
        self._act = activation(config.activation)

    def head(self, norm_weight: torch.Tensor, weight: torch.Tensor) -> tuple[RMSNorm, Map]:
        """The last norm and the head, of which a rank may hold some rows."""
        config, collectives = self._config, self._collectives
        if collectives is None:
            return normed_linear(config.rms_norm_eps, norm_weight, weight, None, self._place)
        share = -(-config.vocab_size // collectives.size)
        padded = functional.pad(weight, [0, 0, 0, share - len(weight)])
        norm, part = normed_linear(config.rms_norm_eps, norm_weight, padded, None, self._place)
        return norm, JoinedHead(part, config.vocab_size, collectives)

    def _summed(self, part: Map) -> Map:
        return part if self._collectives is None else Summed(part, self._collectives)

    def layer(self, index: int, rope: int) -> Layer:
        config = self._config
        tensors = self._checkpoint.attention(index)
        norm, qkv = self._qkv(tensors)
        mlp_norm, mlp, after = self._feed_forward(index)
        return Layer(
            norm=norm,
            qkv=qkv,
            qk_norm=self._qk_norm(tensors),
            rope=rope,
            spec=AttentionSpec(
                config.attention_scale, config.windows[index], config.attention_soft_cap
            ),
            output=self._summed(Linear(tensors.output, tensors.output_bias, self._place)),
            output_norm=self._norm(tensors.post_norm),
            mlp_norm=mlp_norm,
            mlp=self._summed(mlp),
            mlp_output_norm=after,
        )

    def _qkv(self, tensors: AttentionTensors[torch.Tensor]) -> tuple[RMSNorm, Linear]:
        """Join the three maps; queries and keys are interleaved for the rotary embedding."""
        head_dim = self._config.head_dim
        rows = (tensors.query, tensors.key)
        weight = torch.cat([*(_interleave_rows(w, head_dim) for w in rows), tensors.value])
        biases = (tensors.query_bias, tensors.key_bias)
        bias = None
        if tensors.value_bias is not None:
            turned = [_interleave_rows(b, head_dim) for b in biases if b is not None]
            bias = torch.cat([*turned, tensors.value_bias])
        return normed_linear(self._config.rms_norm_eps, tensors.norm, weight, bias, self._place)

    def _qk_norm(self, tensors: AttentionTensors[torch.Tensor]) -> torch.Tensor | None:
        if tensors.query_norm is None or tensors.key_norm is None:
            return None
        query = tensors.query_norm.expand(self._config.num_heads, -1)
        key = tensors.key_norm.expand(self._config.num_kv_heads, -1)
        return self._place.put(interleave_halves(torch.cat((query, key))))

    def _feed_forward(self, index: int) -> tuple[RMSNorm, FeedForward, RMSNorm | None]:
        """Norm, MLP or experts, norm of their output."""
        before, after = self._checkpoint.mlp_norms(index)
        config = self._config
        if config.experts is None or not config.sparse_layers[index]:
            norm, mlp = self._mlp(self._checkpoint.mlp(index), before)
            return norm, mlp, self._norm(after)
        experts = config.experts
        numbers = range(experts.count)
        tensors = (self._checkpoint.expert(index, number) for number in numbers)
        made = [self._mlp(expert, before) for expert in tensors]
        router_weight = self._checkpoint.router(index, experts)
        norm, router = normed_linear(config.rms_norm_eps, before, router_weight, None, self._place)
        mixture = Experts(router, tuple(mlp for _, mlp in made), experts.chosen, experts.normalized)
        return norm, mixture, self._norm(after)

    def _mlp(
        self, tensors: MLPTensors[torch.Tensor], norm_weight: torch.Tensor
    ) -> tuple[RMSNorm, GatedMLP]:
        bias = None
        if tensors.gate_bias is not None and tensors.up_bias is not None:
            bias = torch.cat((tensors.gate_bias, tensors.up_bias))
        weight = torch.cat((tensors.gate, tensors.up))
        norm, gate_up = normed_linear(
            self._config.rms_norm_eps, norm_weight, weight, bias, self._place
        )
        down = Linear(tensors.down, tensors.down_bias, self._place)
        return norm, GatedMLP(gate_up, down, self._act)

    def _norm(self, weight: torch.Tensor | None) -> RMSNorm | None:
        if weight is None:
            return None
        return RMSNorm(self._config.rms_norm_eps, self._place.put(weight))


def _interleave_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the output rows of each head of a weight [heads · head_dim, …], or of a bias."""
    by_head = weight.view(-1, head_dim, *weight.shape[1:]).movedim(1, -1)
    return interleave_halves(by_head).movedim(-1, 1).reshape(weight.shape)
