"""What a backend is given and what it must do."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """Queries of one request: positions `start … end - 1`, at `offset` among the step's tokens."""

    offset: int
    start: int
    end: int
    block_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Queries of this row."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """All rows of a step, and the cache slot that each token writes."""

    rows: tuple[AttentionRow, ...]
    slots: torch.Tensor  # int64 [tokens]: block_id * block_size + position in the block


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What the attention of one layer does: a model makes one for each kind of layer it has."""

    scale: float
    """Factor of the scores: softmax(scale · Q Kᵀ) V."""
    window: int = 0
    """Latest keys that a query sees, its own among them: key j if i - window < j ≤ i. 0: all."""
    soft_cap: float = 0.0
    """Scores become cap · tanh(score / cap) before the mask. 0: they stay."""


class AttentionStep(Protocol):
    """One step's attention, prepared once and run for every layer."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Store keys and values, then attend causally to what `spec` lets each query see.

        query [tokens, heads, head_dim]; key and value [tokens, kv_heads, head_dim]; cache
        [2, blocks, block_size, kv_heads, head_dim], written in place. Returns
        [tokens, heads, head_dim].
        """
        ...


class AttentionBackend(Protocol):
    """Attention for one model on one kind of device."""

    def why_not(self) -> list[str]:
        """Reasons why this backend cannot serve the model here; empty when it can."""
        ...

    def plan(self, batch: AttentionBatch) -> AttentionStep:
        """Prepare a step: everything that does not depend on the layer."""
        ...


def store(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write keys and values [tokens, kv_heads, head_dim] into their slots of a layer's cache."""
    flat = cache.view(2, -1, *key.shape[1:])
    flat[0].index_copy_(0, slots, key)
    flat[1].index_copy_(0, slots, value)
