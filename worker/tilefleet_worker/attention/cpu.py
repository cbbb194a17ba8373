"""Attention on a CPU: gathered blocks through PyTorch's fused kernel, with fixed shapes.

Equal bits for equal requests. The fused kernel multiplies tiles of queries with 512 keys at a time
through MKL, and MKL picks the order of additions from the shape. Measured on AVX2 with torch
2.15.0, over head sizes 32 to 128 and all positions up to 1,040, bits stay the same when

* the queries of a tile are a multiple of 4 (1 to 3 rows take a different kernel), and
* the last tile of keys is at most 192 keys long, or at least 384 (between them MKL splits the
  sum over keys into two even halves), always a multiple of 16.

Masked keys add exactly 0, also when they fill a whole tile: that is why a window starts at a whole
tile below its first key, wherever the query stands in it. So padding to these shapes makes a
token's result independent of its batch-mates, of chunking and of how far the others have got.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from tilefleet_worker.attention.base import AttentionBatch, AttentionRow, AttentionSpec, store
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
        self._soft_cap = config.attention_soft_cap
        self._scratch = _Scratch()

    def why_not(self) -> list[str]:
        """It serves every model whose scores have no cap: the fused kernel has none."""
        if self._soft_cap:
            return ["scores are capped (attn_logit_softcapping); use --backend reference"]
        return []

    def plan(self, batch: AttentionBatch) -> "CPUStep":
        """Sort rows into decodes and chunks. Layouts are made once for each window, when asked."""
        return CPUStep(batch, self._group, self._scratch)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decodes of similar context, attended in one call."""

    offsets: torch.Tensor | slice  # index among the step's tokens; a slice spares a copy
    index: torch.Tensor  # blocks of the keys, then of the values, of all rows
    num_keys: int  # padded, of the longest
    mask: torch.Tensor  # fp32 [rows, 1, 1, num_keys]: 0 or -inf, added to the scores


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries of one prompt and the keys they see, gathered from `first_key` on."""

    row: AttentionRow
    first_key: int
    index: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Layout:
    """Rows of a step for the layers of one window."""

    groups: list[_DecodeGroup]
    chunks: list[_Chunk]


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Which blocks of the cache hold the keys that a row sees."""

    window: int
    num_blocks: int  # of the cache, with the spare one
    block_size: int

    def first_key(self, position: int) -> int:
        """Where to start for a query at `position`: a whole tile and a whole block."""
        if not self.window:
            return 0
        step = math.lcm(_KEY_TILE, self.block_size)
        return max(0, position - self.window + 1) // step * step

    def index(self, rows: list[AttentionRow], num_keys: int) -> torch.Tensor:
        """Blocks of keys, then of values, of each row: an index into both flattened.

        Tables are padded with the last block of the cache, which belongs to nobody.
        """
        width = -(-num_keys // self.block_size)
        table = np.full((2, len(rows), width), self.num_blocks - 1, dtype=np.int64)
        for number, row in enumerate(rows):
            first = self.first_key(row.start) // self.block_size
            used = row.block_ids[first : first + width]
            table[:, number, : len(used)] = used
        table[1] += self.num_blocks
        return torch.from_numpy(table.reshape(-1))


def _decode_groups(rows: list[AttentionRow], blocks: _Blocks) -> list[_DecodeGroup]:
    """Longest first; a group ends where the keys are below half of its longest."""

    def seen(row: AttentionRow) -> int:
        return row.end - blocks.first_key(row.start)

    groups: list[list[AttentionRow]] = []
    for row in sorted(rows, key=seen, reverse=True):
        if groups and seen(row) * 2 >= seen(groups[-1][0]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_decode_group(sorted(group, key=lambda row: row.offset), blocks) for group in groups]


def _decode_group(rows: list[AttentionRow], blocks: _Blocks) -> _DecodeGroup:
    firsts = np.array([blocks.first_key(row.start) for row in rows])[:, None]
    ends = np.array([row.end for row in rows])[:, None]
    num_keys = padded_keys(int((ends - firsts).max()))
    first, last = rows[0].offset, rows[-1].offset
    contiguous = last - first + 1 == len(rows)
    keys = firsts + np.arange(num_keys)[None, :]
    hidden = keys >= ends
    if blocks.window:
        hidden |= keys < ends - blocks.window
    mask = np.where(hidden, np.float32(-np.inf), np.float32(0.0))
    return _DecodeGroup(
        offsets=slice(first, last + 1) if contiguous else torch.tensor([r.offset for r in rows]),
        index=blocks.index(rows, num_keys),
        num_keys=num_keys,
        mask=torch.from_numpy(mask)[:, None, None, :],
    )


def _make_chunk(row: AttentionRow, blocks: _Blocks) -> _Chunk:
    first_key = blocks.first_key(row.start)
    return _Chunk(row, first_key, blocks.index([row], padded_keys(row.end - first_key)))


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

    def __init__(self, batch: AttentionBatch, group: int, scratch: _Scratch) -> None:
        self._slots = batch.slots
        self._decodes = [row for row in batch.rows if row.length == 1]
        self._chunks = [row for row in batch.rows if row.length > 1]
        self._group = group
        self._scratch = scratch
        self._layouts: dict[int, _Layout] = {}

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
        layout = self._layout(spec.window, cache)
        out = torch.empty_like(query)
        for group in layout.groups:
            out[group.offsets] = self._decode(query, group, cache, spec)
        for chunk in layout.chunks:
            part = slice(chunk.row.offset, chunk.row.offset + chunk.row.length)
            stored = self._scratch.gather(cache, chunk.index)
            self._chunk(query[part], chunk, stored, spec, out[part])
        return out

    def _layout(self, window: int, cache: torch.Tensor) -> _Layout:
        """Masks of chunks are built tile by tile in each layer instead of here: all of them kept
        would be as large as the chunk times its context.
        """
        layout = self._layouts.get(window)
        if layout is None:
            blocks = _Blocks(window, *cache.shape[1:3])
            layout = self._layouts[window] = _Layout(
                _decode_groups(self._decodes, blocks),
                [_make_chunk(row, blocks) for row in self._chunks],
            )
        return layout

    def _decode(
        self, query: torch.Tensor, group: _DecodeGroup, cache: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        """One query of each row. Query heads that share a KV head become rows of one tile."""
        rows, (_, heads, head_dim) = len(group.mask), query.shape
        kv_heads = heads // self._group
        stored = self._scratch.gather(cache, group.index).view(2, rows, -1, kv_heads, head_dim)
        keys, values = stored[:, :, : group.num_keys].transpose(2, 3)
        tile = query[group.offsets].view(rows, kv_heads, self._group, head_dim)
        if self._group % _ROW_STEP:
            padded = tile.new_zeros(
                rows, kv_heads, -(-self._group // _ROW_STEP) * _ROW_STEP, head_dim
            )
            padded[:, :, : self._group] = tile
            tile = padded
        out = functional.scaled_dot_product_attention(
            tile, keys, values, attn_mask=group.mask, scale=spec.scale
        )
        return out[:, :, : self._group].reshape(rows, heads, head_dim)

    def _chunk(
        self,
        query: torch.Tensor,
        chunk: _Chunk,
        stored: torch.Tensor,
        spec: AttentionSpec,
        out: torch.Tensor,
    ) -> None:
        """All queries of one row, tile by tile, into `out`."""
        length, heads, head_dim = query.shape
        kv_heads = heads // self._group
        stored = stored.view(2, -1, kv_heads, head_dim)
        for first, last in _tiles(length):
            padding = -(last - first) % _ROW_STEP
            tile = functional.pad(query[first:last], (0, 0, 0, 0, 0, padding))
            num_keys = padded_keys(chunk.row.start + last - chunk.first_key)
            # [2, kv_heads, 1, keys, head_dim], each head seen by its group without a copy
            keys, values = (
                stored[:, :num_keys]
                .permute(0, 2, 1, 3)[:, :, None]
                .expand(-1, -1, self._group, -1, -1)
            )
            result = functional.scaled_dot_product_attention(
                tile.view(-1, kv_heads, self._group, head_dim).permute(1, 2, 0, 3),
                keys,
                values,
                attn_mask=_tile_mask(chunk, first, last + padding, num_keys, spec.window),
                scale=spec.scale,
            )  # [kv_heads, group, queries, head_dim]
            out[first:last] = result.permute(2, 0, 1, 3).flatten(1, 2)[: last - first]


def _tile_mask(chunk: _Chunk, first: int, last: int, num_keys: int, window: int) -> torch.Tensor:
    """Bool [queries, keys]: what queries `first … last - 1` of a chunk see."""
    positions = torch.arange(chunk.row.start + first, chunk.row.start + last)[:, None]
    keys = torch.arange(chunk.first_key, chunk.first_key + num_keys)[None, :]
    mask = keys <= positions
    return mask & (keys > positions - window) if window else mask


def _tiles(length: int) -> list[tuple[int, int]]:
    starts = [*range(0, length, _QUERY_TILE), length]
    return list(itertools.pairwise(starts))
