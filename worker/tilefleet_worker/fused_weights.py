"""From a checkpoint's tensors to the fused decoder's: maps joined, converted, on the device."""

from functools import cache

import torch
from torch.nn import functional

from tilefleet_worker.attention.base import AttentionSpec
from tilefleet_worker.device_matrices import DeviceMatrices, Stored, storing
from tilefleet_worker.errors import ModelError
from tilefleet_worker.fused_decoder import FusedLayer, FusedWeights
from tilefleet_worker.kernels.rotary_store import Rotation, rotary_table
from tilefleet_worker.kernels.routing import Router
from tilefleet_worker.kernels.weight_tiles import Matrix
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.models.checkpoint import AttentionTensors, Checkpoint
from tilefleet_worker.rope_config import RopeConfig
from tilefleet_worker.rotary_frequencies import frequencies
from tilefleet_worker.shards import Shard
from tilefleet_worker.target import arch_of, fp8_type
from tilefleet_worker.weights import Weights


def load(
    config: ModelConfig,
    weights: Weights,
    max_positions: int,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = Shard(),  # noqa: B008 - frozen
) -> FusedWeights:
    """Take all tensors, of each the part that the shard says. config: of the whole model.

    Raises ModelError when the files do not hold exactly what is needed, and when the fused decoder
    lacks what the family needs.
    """
    reasons = why_not(config)
    if reasons:
        raise ModelError(f"The fused decoder cannot serve this model: {'; '.join(reasons)}.")
    checkpoint = Checkpoint(config, weights, storing(weights, config.quantization), shard)
    source = _Source(config, checkpoint, max_positions, dtype, device, shard)
    made = source.weights()
    weights.check_all_taken()
    return made


def why_not(config: ModelConfig) -> list[str]:
    """What the model needs and the fused decoder lacks; empty when it can serve it."""
    family = config.family
    needs = {
        "norms of outputs": family.sandwich_norms,
        "scaled embeddings": family.scaled_embedding,
        "biases of the MLP": config.mlp_bias,
        f"activation {config.activation}": config.activation != "silu",
        "capped logits": bool(config.logits_soft_cap),
    }
    return [f"it has no {what}" for what, needed in needs.items() if needed]


def rope_table(
    config: RopeConfig, head_dim: int, max_positions: int, device: torch.device
) -> torch.Tensor:
    """Table of one rotary embedding; see kernels.rotary_store."""
    turns = frequencies(config, head_dim).double().to(device)
    return rotary_table(turns, max_positions, config.amplitude)


class _Source:
    """Tensors of one checkpoint, converted and moved one by one."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint[Stored],
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard,
    ) -> None:
        self._config = config
        self._shard = shard
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._matrices = DeviceMatrices(dtype, device, fp8_type(arch_of(device)))
        self._table = cache(lambda rope: rope_table(rope, config.head_dim, max_positions, device))

    def weights(self) -> FusedWeights:
        embedding = self._checkpoint.embedding()
        head = self._checkpoint.head(embedding)
        put = self._put(embedding)
        return FusedWeights(
            embedding=put,
            layers=tuple(self._layer(index) for index in range(self._config.num_layers)),
            final_norm=self._put(self._checkpoint.final_norm()),
            head=put if head is embedding else self._head(head, put),
        )

    def _head(self, head: Stored, embedding: torch.Tensor) -> torch.Tensor:
        """A head of its own, or this rank's rows: as many on every rank, the last ones perhaps 0.

        Tied rows are those of the embedding that is there already.
        """
        config, shard = self._config, self._shard
        if config.tie_word_embeddings:
            made = embedding[shard.vocabulary(config.vocab_size)]
        else:
            made = self._matrices.dense(head)
        missing = shard.vocabulary_share(config.vocab_size) - len(made)
        return functional.pad(made, [0, 0, 0, missing]) if missing else made

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype).to(self._device)

    def _optional(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else self._put(tensor)

    def _layer(self, index: int) -> FusedLayer:
        config = self._config
        tensors, joined = self._checkpoint.attention(index), self._matrices.joined
        mlp_norm, _ = self._checkpoint.mlp_norms(index)
        router, gate_up, down = self._mlp(index)
        return FusedLayer(
            input_norm=self._put(tensors.norm),
            qkv=joined(tensors.query, tensors.key, tensors.value),
            qkv_bias=self._optional(_joined_bias(tensors)),
            rotation=Rotation(
                self._table(config.ropes[index]),
                config.rms_norm_eps,
                self._optional(tensors.query_norm),
                self._optional(tensors.key_norm),
            ),
            spec=AttentionSpec(
                config.attention_scale, config.windows[index], config.attention_soft_cap
            ),
            output=joined(tensors.output),
            output_bias=self._optional(tensors.output_bias),
            mlp_norm=self._put(mlp_norm),
            gate_up=gate_up,
            down=down,
            router=router,
        )

    def _mlp(self, index: int) -> tuple[Router | None, Matrix, Matrix]:
        """Router where the layer has experts; gates and ups, and downs: of one MLP or of all."""
        experts, made = self._config.experts, self._matrices
        if experts is None or not self._config.sparse_layers[index]:
            mlp = self._checkpoint.mlp(index)
            return None, made.joined(mlp.gate, mlp.up), made.joined(mlp.down)
        router = made.dense(self._checkpoint.router(index, experts))
        gate_ups, downs = [], []
        for number in range(experts.count):
            mlp = self._checkpoint.expert(index, number)
            gate_ups.append(made.joined(mlp.gate, mlp.up))
            downs.append(made.joined(mlp.down))
        return (
            Router(router, experts.chosen, experts.normalized),
            made.stacked(gate_ups),
            made.stacked(downs),
        )


def _joined_bias(tensors: AttentionTensors[Stored]) -> torch.Tensor | None:
    parts = (tensors.query_bias, tensors.key_bias, tensors.value_bias)
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
