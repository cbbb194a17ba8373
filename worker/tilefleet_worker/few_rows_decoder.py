"""The decoder's way for steps of few rows: six launches a layer, and bits that no batch changes.

Product with norm, rotary and store, attention, product that adds, product with norm and gate,
product that adds. Every sum of a row has one order for all numbers of rows that this way takes.
"""

from itertools import pairwise

import torch

from tilefleet_worker.attention.triton.backend import TritonAttention
from tilefleet_worker.attention.triton.tiles import architecture
from tilefleet_worker.fused_decoder import FusedDecoder, FusedWeights, StepInputs, Workspace
from tilefleet_worker.kernels.product_tiles import TILES
from tilefleet_worker.kernels.products import Products, ProductShape, Stream
from tilefleet_worker.kernels.weight_tiles import Matrix
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.model_config import ModelConfig


def why_not(weights: FusedWeights) -> list[str]:
    """Reasons against this way for a model on its device; empty when it can be taken."""
    dtype, device = weights.embedding.dtype, weights.embedding.device
    # Not float16: the stream between blocks is not normed yet, and may exceed 65504. On a GPU not
    # float32 either, whose products the tensor cores would round.
    floats = dtype == torch.bfloat16 or (device.type == "cpu" and dtype == torch.float32)
    reasons = {
        f"weights are {dtype}": not floats,
        "it has a mixture of experts": any(layer.router is not None for layer in weights.layers),
        "it has quantised matrices": not all(
            isinstance(matrix, torch.Tensor)
            for layer in weights.layers
            for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)
        ),
    }
    return [reason for reason, holds in reasons.items() if holds]


class FewRowsDecoder(FusedDecoder):
    """A fused decoder that takes steps of up to max_few_rows tokens this way, others as ever.

    invariant: as many as can have the bits of a row alone; else as many as are faster so.
    """

    def __init__(
        self, config: ModelConfig, weights: FusedWeights, workspace: Workspace, invariant: bool
    ) -> None:
        super().__init__(config, weights, workspace)
        dtype, device = weights.embedding.dtype, weights.embedding.device
        tiles = TILES["interpreter" if device.type == "cpu" else architecture(device)]
        most = tiles.max_rows if invariant else tiles.fast_rows
        self.max_few_rows = min(most, workspace.max_tokens)
        self._products = Products(tiles, _shapes(config), config.rms_norm_eps, dtype, device)
        own = Stream.empty(self.max_few_rows, config.hidden_size, dtype, device)
        self._stream = Stream(
            workspace.residual[: self.max_few_rows],
            workspace.normed[: self.max_few_rows],
            own.squares,
        )

    def forward(
        self, inputs: StepInputs, attention: TritonAttention, cache: KVCache
    ) -> torch.Tensor:
        """Logits fp32 [wanted, vocabulary]. Launches only; never waits for the device."""
        tokens = len(inputs.token_ids)
        if tokens > self.max_few_rows:
            return super().forward(inputs, attention, cache)
        products, space, weights = self._products, self.workspace, self.weights
        stream = self._stream.rows(tokens)
        self.embed(inputs, stream.residual)
        products.begin(weights.layers[0].input_norm, stream)
        norms = [*(layer.input_norm for layer in weights.layers), weights.final_norm]
        qkv, gates = space.qkv[:tokens], space.activated[:tokens]
        for index, (layer, (_, norm)) in enumerate(
            zip(weights.layers, pairwise(norms), strict=True)
        ):
            products.normed(stream, _plain(layer.qkv), layer.qkv_bias, qkv)
            attended = self.attended(qkv, layer, inputs, attention, cache.layer(index))
            products.add(attended, _plain(layer.output), layer.output_bias, layer.mlp_norm, stream)
            products.gated(stream, _plain(layer.gate_up), gates)
            products.add(gates, _plain(layer.down), None, norm, stream)
        if inputs.logits_index is not None:
            stream = stream.select(inputs.logits_index)
        logits = self.logits_space(len(stream.residual))
        return products.normed(stream, weights.head, None, logits)


def _plain(matrix: Matrix) -> torch.Tensor:
    """The matrix, which why_not has found to be of floats. Raises TypeError when it is not."""
    if isinstance(matrix, torch.Tensor):
        return matrix
    raise TypeError(f"{type(matrix).__name__} has no way for few rows; see why_not")


def _shapes(config: ModelConfig) -> tuple[ProductShape, ...]:
    """The matrices of a decoder."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    return (
        ProductShape(heads + 2 * config.num_kv_heads * config.head_dim, hidden),
        ProductShape(hidden, heads),
        ProductShape(inner, hidden, gated=True),
        ProductShape(hidden, inner),
        ProductShape(config.vocab_size, hidden),
    )
