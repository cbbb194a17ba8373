"""What a decoder of our families stores, reads and computes, from its config alone.

Formulas. Matrices of a layer: (heads + 2 · kv_heads) · head_dim · hidden, heads · head_dim · hidden
and 3 · hidden · inner of its MLP or of each expert. Experts that a step reads: with uniform routing
E · (1 - (1 - k/E)^tokens). FLOPs of a token: 2 a weight that it meets, and in each layer
4 · heads · head_dim a key that it sees. KV: 2 · kv_heads · head_dim values a token and layer, in
bf16; a windowed layer reads its window and stores everything, as our pool does.
"""

from dataclasses import dataclass
from typing import Protocol

from tilefleet_worker.model_config import ModelConfig

_HALF = 2  # bytes of bf16


class Costs(Protocol):
    """Of one model. tokens: of one step, all of different requests or of one prompt."""

    @property
    def weight_bytes(self) -> float:
        """In memory."""
        ...

    def kv_bytes(self, context: int) -> float:
        """In memory, of one request with so many tokens."""
        ...

    def step_weight_bytes(self, tokens: int) -> float:
        """Read by a step of so many tokens."""
        ...

    def kv_read_bytes(self, context: int) -> float:
        """Read by the decode of one token after so many."""
        ...

    def token_flops(self, context: int) -> float:
        """Of one token that sees so many."""
        ...


def touched(experts: int, chosen: int, tokens: int) -> float:
    """Experts that a step of so many tokens is expected to read under uniform routing."""
    missed = 1.0 - chosen / experts
    return float(experts * (1.0 - missed**tokens))


@dataclass(frozen=True, slots=True)
class DecoderCosts:
    """Of a model that the worker serves; see Costs."""

    config: ModelConfig

    @property
    def weight_bytes(self) -> float:
        """See Costs."""
        config = self.config
        embedding = config.vocab_size * config.hidden_size * _HALF
        tied = config.tie_word_embeddings
        experts = config.experts.count if config.experts else 0
        return self._read(experts) + (0 if tied else embedding)

    def step_weight_bytes(self, tokens: int) -> float:
        """See Costs. The head is read whole, of the embedding one row a token: left out."""
        experts = self.config.experts
        return self._read(touched(experts.count, experts.chosen, tokens) if experts else 0)

    def kv_bytes(self, context: int) -> float:
        """See Costs."""
        return self._kv_layer * self.config.num_layers * context

    def kv_read_bytes(self, context: int) -> float:
        """See Costs."""
        return self._kv_layer * sum(self._seen(context))

    def token_flops(self, context: int) -> float:
        """See Costs."""
        config = self.config
        experts = config.experts
        matrices = self._attention * config.num_layers + self._dense
        if experts is not None:
            matrices += self._sparse * (self._expert * experts.chosen + self._router)
        matrices += config.vocab_size * config.hidden_size
        keys = sum(self._seen(context))
        return 2.0 * matrices + 4.0 * config.num_heads * config.head_dim * keys

    def _read(self, experts: float) -> float:
        """Bytes of everything but the input embedding, with so many experts a layer."""
        config = self.config
        stored = self._attention * config.num_layers + self._dense
        of_experts = self._sparse * self._expert * experts
        plain = self._sparse * self._router + config.vocab_size * config.hidden_size
        return (stored + of_experts) * self._matrix_bytes + plain * _HALF

    @property
    def _matrix_bytes(self) -> float:
        """Bytes of a weight of a layer's matrices, its share of the scale's fp32 included."""
        quantization = self.config.quantization
        if quantization is None:
            return _HALF
        height, width = quantization.block
        hidden = self.config.hidden_size
        return 1 + 4 / ((height or hidden) * (width or hidden))

    @property
    def _attention(self) -> int:
        config = self.config
        heads = 2 * config.num_heads + 2 * config.num_kv_heads
        return heads * config.head_dim * config.hidden_size

    @property
    def _sparse(self) -> int:
        return sum(self.config.sparse_layers)

    @property
    def _dense(self) -> int:
        """Weights of all dense MLPs."""
        config = self.config
        layers = config.num_layers - self._sparse
        return 3 * config.hidden_size * config.intermediate_size * layers

    @property
    def _expert(self) -> int:
        experts = self.config.experts
        return 0 if experts is None else 3 * self.config.hidden_size * experts.intermediate_size

    @property
    def _router(self) -> int:
        experts = self.config.experts
        return 0 if experts is None else self.config.hidden_size * experts.count

    @property
    def _kv_layer(self) -> int:
        """KV bytes of a token in one layer."""
        return 2 * self.config.num_kv_heads * self.config.head_dim * _HALF

    def _seen(self, context: int) -> list[int]:
        """Keys that each layer sees."""
        return [min(context, window) if window else context for window in self.config.windows]
