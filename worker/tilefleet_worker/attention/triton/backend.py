"""Triton attention as a backend: decodes and prompt chunks of a step in at most two launches a layer."""

from dataclasses import dataclass

import torch

from tilefleet_worker.attention.base import AttentionBatch, AttentionSpec, store
from tilefleet_worker.attention.triton.decode import DecodeWorkspace, paged_decode
from tilefleet_worker.attention.triton.prefill import paged_prefill, prefill_tiles
from tilefleet_worker.attention.triton.tiles import PREFILL, architecture, decode_tile
from tilefleet_worker.model_config import ModelConfig

HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the rows of a step are: decodes first, then chunks. All tensors int32 on the device.

    A captured graph holds one of these over static memory.
    """

    num_decodes: int
    block_table: torch.Tensor  # [rows, blocks]
    context_lens: torch.Tensor  # [rows], with the new tokens; 0 for padding
    tiles: torch.Tensor | None  # prefill_tiles() of the chunks, or None when there is none


class TritonAttention:
    """Attention of one model on a GPU. Owns the scratch memory of the split-KV reduction.

    max_rows: most requests of a step. max_context: most tokens of a request.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_rows: int,
        max_context: int,
        device: torch.device,
    ) -> None:
        self._head_dim = config.head_dim
        self._device = device
        arch = architecture(device)
        self._decode_tile = decode_tile(arch, config.head_dim)
        self.prefill_tile = PREFILL[arch]
        group = config.num_heads // config.num_kv_heads
        self._workspace = DecodeWorkspace(
            max_rows, config.num_kv_heads, group, config.head_dim, max_context,
            self._decode_tile, device,
        )  # fmt: skip

    def why_not(self) -> list[str]:
        """Reasons why this backend cannot serve the model here."""
        if self._head_dim in HEAD_DIMS:
            return []
        return [f"heads have {self._head_dim} dimensions, and {HEAD_DIMS} are supported"]

    def plan(self, batch: AttentionBatch) -> "TritonStep":
        """Sort nothing: rows of length 1 must stand first. Copies the metadata to the device."""
        rows = batch.rows
        lengths = [row.length for row in rows]
        width = max(len(row.block_ids) for row in rows)
        table = [[*row.block_ids, *(0,) * (width - len(row.block_ids))] for row in rows]
        num_decodes = next((i for i, n in enumerate(lengths) if n > 1), len(rows))
        contexts = [row.end for row in rows]
        chunked = num_decodes < len(rows)
        lengths[:num_decodes] = [0] * num_decodes
        tiles = prefill_tiles(
            lengths, contexts, self.prefill_tile.rows, self._device, first_row=num_decodes
        )
        paged = PagedBatch(
            num_decodes,
            torch.tensor(table, dtype=torch.int32, device=self._device),
            torch.tensor(contexts, dtype=torch.int32, device=self._device),
            tiles if chunked else None,
        )
        return TritonStep(self, paged, batch.slots)

    def attend(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        batch: PagedBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Attend to what the cache holds, new tokens included. Returns out, like query in shape."""
        keys, values = cache.unbind(0)
        decodes = batch.num_decodes
        if decodes:
            paged_decode(
                query[:decodes], keys, values, batch.block_table, batch.context_lens,
                out[:decodes], self._workspace, self._decode_tile, spec.scale, spec.window,
                spec.soft_cap,
            )  # fmt: skip
        if batch.tiles is not None:
            paged_prefill(
                query, keys, values, batch.block_table, batch.tiles, out, self.prefill_tile,
                spec.scale, spec.window, spec.soft_cap,
            )  # fmt: skip
        return out


class TritonStep:
    """One step by the Protocol of every backend. The fused decoder calls `attend` instead."""

    def __init__(self, backend: TritonAttention, batch: PagedBatch, slots: torch.Tensor) -> None:
        self._backend = backend
        self._batch = batch
        self._slots = slots

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """See AttentionStep.forward."""
        store(key, value, cache, self._slots)
        query = query.contiguous()
        return self._backend.attend(query, cache, torch.empty_like(query), self._batch, spec)
