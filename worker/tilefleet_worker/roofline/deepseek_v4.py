"""DeepSeek-V4-Flash: what it stores, reads and computes, from its published shapes.

Sources: transformers `models/deepseek_v4` (shapes, layer kinds), vLLM `models/deepseek_v4` (types
of storage, cache rows). 43 layers: 2 see a window of 128 alone, 21 also 512 chosen entries of 4
tokens each (CSA), 20 also every entry of 128 tokens (HCA). Experts are fp4 with a scale byte for 32
weights, other large matrices fp8, compressors bf16. The draft layer (MTP) is left out.
"""

from dataclasses import dataclass

from tilefleet_worker.roofline.costs import touched

_HIDDEN, _VOCABULARY, _LAYERS, _CSA, _HCA = 4096, 129_280, 43, 21, 20
_HEADS, _HEAD_DIM, _INDEX_HEADS, _INDEX_DIM, _TOP_ENTRIES, _WINDOW = 64, 512, 64, 128, 512, 128
_EXPERTS, _CHOSEN, _INNER = 256, 6, 2048

_ATTENTION = 1024 * 4096 + 512 * 4096 + 32768 * 1024 + 8192 * 4096 + 4096 * 8192  # fp8 a layer
_SHARED = 3 * _HIDDEN * _INNER  # fp8 a layer
_INDEXER = 8192 * 1024  # fp8 a CSA layer
_CSA_HALF = 2 * 1024 * 4096 + 2 * 256 * 4096 + 64 * 4096  # bf16 a CSA layer: compressors, indexer
_HCA_HALF = 2 * 512 * 4096
_ROUTER = _EXPERTS * _HIDDEN  # bf16 a layer
_STREAMS = 2 * 24 * 4 * _HIDDEN  # fp32 a layer: mixing of the four streams
_EXPERT_BYTES = 3 * _HIDDEN * _INNER * (1 / 2 + 1 / 32)
_ROW_BYTES, _KEY_BYTES = 584, 132  # window row or entry in fp8; key of the indexer
_PAGE_TOKENS, _PAGE_BYTES, _SLOT_BYTES = 256, 985_664, 5_132_288


def _fp8_weights() -> int:
    return _LAYERS * (_ATTENTION + _SHARED) + _CSA * _INDEXER


def _half_weights() -> int:
    return _LAYERS * _ROUTER + _CSA * _CSA_HALF + _HCA * _HCA_HALF


@dataclass(frozen=True, slots=True)
class DeepSeekV4FlashCosts:
    """See costs.Costs. Engines that serve it need a cache of its own kind; ours does not yet."""

    @property
    def weight_bytes(self) -> float:
        """See Costs."""
        return self._read(_EXPERTS) + 2 * _VOCABULARY * _HIDDEN

    def step_weight_bytes(self, tokens: int) -> float:
        """See Costs."""
        return self._read(touched(_EXPERTS, _CHOSEN, tokens))

    @staticmethod
    def _read(experts: float) -> float:
        plain = _fp8_weights() + 2 * _half_weights() + 4 * _LAYERS * _STREAMS
        return plain + _LAYERS * experts * _EXPERT_BYTES + 2 * _VOCABULARY * _HIDDEN

    def kv_bytes(self, context: int) -> float:
        """See Costs: a slot of fixed size, and pages of 256 tokens."""
        return _SLOT_BYTES + -(-context // _PAGE_TOKENS) * _PAGE_BYTES

    def kv_read_bytes(self, context: int) -> float:
        """See Costs."""
        rows = _LAYERS * min(context, _WINDOW) + _CSA * min(context // 4, _TOP_ENTRIES)
        rows += _HCA * (context // 128)
        return rows * _ROW_BYTES + _CSA * (context // 4) * _KEY_BYTES

    def token_flops(self, context: int) -> float:
        """See Costs."""
        matrices = _fp8_weights() + _half_weights() + _LAYERS * _STREAMS
        matrices += _LAYERS * _CHOSEN * _SHARED + _VOCABULARY * _HIDDEN
        keys = _LAYERS * min(context, _WINDOW) + _CSA * min(context // 4, _TOP_ENTRIES)
        keys += _HCA * (context // 128)
        scored = _CSA * (context // 4)
        return (
            2.0 * matrices
            + 4.0 * _HEADS * _HEAD_DIM * keys
            + 2.0 * _INDEX_HEADS * _INDEX_DIM * scored
        )
