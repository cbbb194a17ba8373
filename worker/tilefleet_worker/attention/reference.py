"""The oracle: attention written from its definition, in fp64, one request after the other.

softmax(cap(scale · Q Kᵀ) + mask) V, with no tiling, no padding and no fused kernel.
"""

import math

import torch

from tilefleet_worker.attention.base import AttentionBatch, AttentionRow, AttentionSpec, store
from tilefleet_worker.model_config import ModelConfig


class ReferenceAttention:
    """Slow and simple: what the other backends are tested against."""

    def __init__(self, config: ModelConfig) -> None:
        self._group = config.num_heads // config.num_kv_heads

    def why_not(self) -> list[str]:
        """It serves every model."""
        return []

    def plan(self, batch: AttentionBatch) -> "ReferenceStep":
        """Nothing to prepare."""
        return ReferenceStep(batch, self._group)


class ReferenceStep:
    """One step of the oracle."""

    def __init__(self, batch: AttentionBatch, group: int) -> None:
        self._batch = batch
        self._group = group

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """See AttentionStep.forward."""
        store(key, value, cache, self._batch.slots)
        out = torch.empty_like(query)
        for row in self._batch.rows:
            part = slice(row.offset, row.offset + row.length)
            out[part] = self._attend(query[part], row, cache, spec)
        return out

    def _attend(
        self, query: torch.Tensor, row: AttentionRow, cache: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        blocks = list(row.block_ids)
        # [2, positions, kv_heads, head_dim], then one copy of each head for its group of queries
        stored = cache[:, blocks].flatten(1, 2)[:, : row.end].double()
        keys, values = stored.repeat_interleave(self._group, dim=2)
        scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * spec.scale
        if spec.soft_cap:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        key_positions = torch.arange(row.end, device=query.device)[None, :]
        positions = torch.arange(row.start, row.end, device=query.device)[:, None]
        visible = key_positions <= positions
        if spec.window:
            visible &= key_positions > positions - spec.window
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
