"""Attention on a CPU: gathered blocks through PyTorch's fused kernel, with fixed shapes.

Equal bits for equal requests. The fused kernel multiplies tiles of queries with 512 keys at a time
through MKL, and MKL picks the order of additions from the shape. Measured on AVX2 with torch
2.15.0, over head sizes 32 to 128 and all positions up to 1,040, bits stay the same when

* the queries of a tile are a multiple of 4 (1 to 3 rows take a different kernel), and
* the last tile of keys is at most 192 keys long, or at least 384 (between them MKL splits the
  sum over keys into two even halves), always a multiple of 16.

Masked keys add exactly 0. So padding to these shapes makes a token's result independent of its
batch-mates, of chunking and of how far the others have got.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from tilefleet_worker.attention.base import AttentionBatch, AttentionRow, store
from tilefleet_worker.model_config import ModelConfig

_KEY_TILE = 512
_KEY_STEP = 16
_LAST_SMALL, _FIRST_LARGE = 192, 384
_ROW_STEP = 4
# Queries of a prompt attended at a time: a tile sees no keys behind its end, so smaller tiles
# compute less above the diagonal, and larger ones call less often.
_QUERY_TILE = 128


def padded_keys(num_keys: int) -> int:
    """Keys to attend to for `num_keys` real ones: the smallest shape with the same bits."""
    whole, rest = divmod(num_keys, _KEY_TILE)
    rest = -(-rest // _KEY_STEP) * _KEY_STEP
    if _LAST_SMALL < rest < _FIRST_LARGE:
        rest = _FIRST_LARGE
    return whole * _KEY_TILE + rest


class CPUAttention:
    """Decodes in a few padded batches; prompt chunks one request at a time, in tiles."""

    def __init__(self, config: ModelConfig) -> None:
        self._group = config.num_heads // config.num_kv_heads
        self._scratch = _Scratch()

    def why_not(self) -> list[str]:
        """It serves every model with fp32 keys and values."""
        return []

    def plan(self, batch: AttentionBatch) -> "CPUStep":
        """Sort rows into decodes and chunks, and build the masks of the decodes once.

        Masks of chunks are built tile by tile in each layer: all of them kept would be as large as
        the chunk times its context.
        """
        decodes = [row for row in batch.rows if row.length == 1]
        chunks = [row for row in batch.rows if row.length > 1]
        return CPUStep(batch.slots, _decode_groups(decodes), chunks, self._group, self._scratch)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decodes of similar context, attended in one call."""

    offsets: torch.Tensor | slice  # index among the step's tokens; a slice spares a copy
    tables: list[tuple[int, ...]]
    num_keys: int  # padded, of the longest
    mask: torch.Tensor  # fp32 [rows, 1, 1, num_keys]: 0 or -inf, added to the scores


def _decode_groups(rows: list[AttentionRow]) -> list[_DecodeGroup]:
    """Longest first; a group ends where the context is below half of its longest."""
    ordered = sorted(rows, key=lambda row: -row.end)
    groups: list[list[AttentionRow]] = []
    for row in ordered:
        if groups and row.end * 2 >= groups[-1][0].end:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_decode_group(sorted(group, key=lambda row: row.offset)) for group in groups]


def _decode_group(rows: list[AttentionRow]) -> _DecodeGroup:
    ends = np.array([row.end for row in rows])
    num_keys = padded_keys(int(ends.max()))
    first, last = rows[0].offset, rows[-1].offset
    contiguous = last - first + 1 == len(rows)
    hidden = np.arange(num_keys)[None, :] >= ends[:, None]
    mask = np.where(hidden, np.float32(-np.inf), np.float32(0.0))
    return _DecodeGroup(
        offsets=slice(first, last + 1) if contiguous else torch.tensor([r.offset for r in rows]),
        tables=[row.block_ids for row in rows],
        num_keys=num_keys,
        mask=torch.from_numpy(mask)[:, None, None, :],
    )


class _Scratch:
    """Memory for gathered blocks, kept between steps: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def gather(self, cache: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Copy blocks of keys, then of values: [len(index), block_size, kv_heads, head_dim].

        The result is overwritten by the next call. cache as in AttentionStep.forward, index into
        its first two dimensions flattened.
        """
        blocks = cache.flatten(0, 1)
        count = index.numel() * blocks[0].numel()
        if self._memory.numel() < count:
            self._memory = torch.zeros(count)
        out = self._memory[:count].view(index.numel(), *blocks.shape[1:])
        return torch.index_select(blocks, 0, index, out=out)


class CPUStep:
    """One step of the CPU backend."""

    def __init__(
        self,
        slots: torch.Tensor,
        groups: list[_DecodeGroup],
        chunks: list[AttentionRow],
        group: int,
        scratch: _Scratch,
    ) -> None:
        self._slots = slots
        self._groups = groups
        self._chunks = chunks
        self._group = group
        self._scratch = scratch
        self._index: dict[int, torch.Tensor] = {}

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        """See AttentionStep.forward."""
        store(key, value, cache, self._slots)
        out = torch.empty_like(query)
        for number, group in enumerate(self._groups):
            index = self._block_index(number, group.tables, group.num_keys, cache)
            out[group.offsets] = self._decode(query, group, index, cache)
        for number, row in enumerate(self._chunks, len(self._groups)):
            index = self._block_index(number, [row.block_ids], padded_keys(row.end), cache)
            part = slice(row.offset, row.offset + row.length)
            self._chunk(query[part], row, self._scratch.gather(cache, index), out[part])
        return out

    def _block_index(
        self, number: int, tables: list[tuple[int, ...]], num_keys: int, cache: torch.Tensor
    ) -> torch.Tensor:
        """Blocks of keys of all rows, then of values. Built at the first layer, then reused.

        Tables are padded with the last block of the cache, which belongs to nobody.
        """
        index = self._index.get(number)
        if index is None:
            num_blocks, block_size = cache.shape[1:3]
            width = -(-num_keys // block_size)
            table = np.full((2, len(tables), width), num_blocks - 1, dtype=np.int64)
            for row, blocks in enumerate(tables):
                used = blocks[:width]
                table[:, row, : len(used)] = used
            table[1] += num_blocks
            index = self._index[number] = torch.from_numpy(table.reshape(-1))
        return index

    def _decode(
        self, query: torch.Tensor, group: _DecodeGroup, index: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        """One query of each row. Query heads that share a KV head become rows of one tile."""
        rows, (_, heads, head_dim) = len(group.tables), query.shape
        kv_heads = heads // self._group
        stored = self._scratch.gather(cache, index).view(2, rows, -1, kv_heads, head_dim)
        keys, values = stored[:, :, : group.num_keys].transpose(2, 3)
        tile = query[group.offsets].view(rows, kv_heads, self._group, head_dim)
        if self._group % _ROW_STEP:
            padded = tile.new_zeros(
                rows, kv_heads, -(-self._group // _ROW_STEP) * _ROW_STEP, head_dim
            )
            padded[:, :, : self._group] = tile
            tile = padded
        out = functional.scaled_dot_product_attention(tile, keys, values, attn_mask=group.mask)
        return out[:, :, : self._group].reshape(rows, heads, head_dim)

    def _chunk(
        self, query: torch.Tensor, row: AttentionRow, stored: torch.Tensor, out: torch.Tensor
    ) -> None:
        """All queries of one row, tile by tile, into `out`."""
        length, heads, head_dim = query.shape
        kv_heads = heads // self._group
        stored = stored.view(2, -1, kv_heads, head_dim)
        for first, last in _tiles(length):
            padding = -(last - first) % _ROW_STEP
            tile = functional.pad(query[first:last], (0, 0, 0, 0, 0, padding))
            num_keys = padded_keys(row.start + last)
            # [2, kv_heads, 1, keys, head_dim], each head seen by its group without a copy
            keys, values = (
                stored[:, :num_keys]
                .permute(0, 2, 1, 3)[:, :, None]
                .expand(-1, -1, self._group, -1, -1)
            )
            positions = torch.arange(row.start + first, row.start + last + padding)
            mask = torch.arange(num_keys)[None, :] <= positions[:, None]
            result = functional.scaled_dot_product_attention(
                tile.view(-1, kv_heads, self._group, head_dim).permute(1, 2, 0, 3),
                keys,
                values,
                attn_mask=mask,
            )  # [kv_heads, group, queries, head_dim]
            out[first:last] = result.permute(2, 0, 1, 3).flatten(1, 2)[: last - first]


def _tiles(length: int) -> list[tuple[int, int]]:
    starts = [*range(0, length, _QUERY_TILE), length]
    return list(itertools.pairwise(starts))
