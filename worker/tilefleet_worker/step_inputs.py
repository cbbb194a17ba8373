"""A plan as the device reads it: laid out in numpy, sent in one copy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tilefleet_worker.attention.triton.backend import PagedBatch
from tilefleet_worker.attention.triton.prefill import query_tiles
from tilefleet_worker.fused_decoder import StepInputs
from tilefleet_worker.step import StepPlan, StepRow

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A plan in arrays. Rows of one token first, then longer ones; tokens in that order."""

    rows: tuple[StepRow, ...]
    num_decodes: int
    token_ids: Ints  # [tokens]
    positions: Ints  # [tokens]
    slots: Ints  # [tokens]
    context_lens: Ints  # [rows]
    lengths: Ints  # [rows]
    block_table: Ints  # [rows, blocks of the widest]
    logits_index: Ints  # [sampled rows]: index of the last token of each

    @property
    def decode_only(self) -> bool:
        """True when every row is one token: such a step can be a captured graph."""
        return self.num_decodes == len(self.rows)

    @property
    def sampled(self) -> tuple[StepRow, ...]:
        """Rows that want a token, in the order of logits_index."""
        return tuple(row for row in self.rows if row.sample)


def lay_out(plan: StepPlan, block_size: int) -> StepArrays:
    """Lay out a plan that has rows. Raises IndexError when a row reaches beyond its blocks."""
    rows = tuple(sorted(plan.rows, key=lambda row: row.length > 1))
    lengths = np.array([row.length for row in rows], dtype=np.int32)
    ends = np.array([row.end for row in rows], dtype=np.int32)
    table = np.zeros((len(rows), max(len(row.block_ids) for row in rows)), dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.block_ids)] = row.block_ids
        if row.end > len(row.block_ids) * block_size:
            raise IndexError(f"request {row.request_id} reaches beyond its blocks")
    row_of = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
    last = np.cumsum(lengths, dtype=np.int32)  # tokens before the end of each row
    positions = np.arange(last[-1], dtype=np.int32) - (last - ends)[row_of]
    slots = table[row_of, positions // block_size] * block_size + positions % block_size
    token_ids = np.fromiter((t for row in rows for t in row.token_ids), np.int32, int(last[-1]))
    sampled = np.array([row.sample for row in rows], dtype=bool)
    return StepArrays(
        rows, int((lengths == 1).sum()), token_ids, positions, slots, ends, lengths, table,
        (last - 1)[sampled],
    )  # fmt: skip


class InputBuffer:
    """Inputs of a step in one int32 buffer on host and device: one copy a step.

    The place of each part depends on the numbers of tokens, rows and logits alone, so the views of
    a padded batch, which a graph captured, stay the same.
    """

    def __init__(
        self, max_tokens: int, max_rows: int, max_blocks: int, tile_rows: int, device: torch.device
    ) -> None:
        self._width = max_blocks
        self._tile_rows = tile_rows
        most_tiles = max_tokens // tile_rows + max_rows
        size = 3 * max_tokens + (2 + max_blocks) * max_rows + 4 * most_tiles
        pinned = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._numpy = self._host.numpy()
        self._device = torch.zeros(size, dtype=torch.int32, device=device)

    def decode(self, arrays: StepArrays | None, padded_rows: int) -> StepInputs:
        """Send decodes, padded to a number of rows; None sends padding alone, for a capture."""
        count = padded_rows
        parts = self._parts((count, count, count, count, count * self._width))
        token_ids, positions, slots, contexts, table = (self._numpy[part] for part in parts)
        rows = 0 if arrays is None else len(arrays.rows)
        for target, padding in ((token_ids, 0), (positions, 0), (slots, -1), (contexts, 0)):
            target[rows:] = padding
        if arrays is not None:
            token_ids[:rows], positions[:rows] = arrays.token_ids, arrays.positions
            slots[:rows], contexts[:rows] = arrays.slots, arrays.context_lens
            table.reshape(count, -1)[:rows, : arrays.block_table.shape[1]] = arrays.block_table
        views = self._send(parts)
        paged = PagedBatch(count, views[4].view(count, -1), views[3], None)
        return StepInputs(views[0], views[1], views[2], paged, None)

    def mixed(self, arrays: StepArrays) -> StepInputs:
        """Send rows of any lengths as they are."""
        tokens, rows = len(arrays.token_ids), len(arrays.rows)
        logits = len(arrays.logits_index)
        lengths = np.where(np.arange(rows) < arrays.num_decodes, 0, arrays.lengths)
        tiles = query_tiles(lengths, arrays.context_lens, self._tile_rows, arrays.num_decodes)
        sizes = (tokens, tokens, tokens, rows, rows * self._width, logits, tiles.size)
        parts = self._parts(sizes)
        for part, values in zip(
            parts,
            (arrays.token_ids, arrays.positions, arrays.slots, arrays.context_lens, None,
             arrays.logits_index, tiles.reshape(-1)),
            strict=True,
        ):  # fmt: skip
            if values is not None:
                self._numpy[part] = values
        table = self._numpy[parts[4]].reshape(rows, -1)
        table[:, : arrays.block_table.shape[1]] = arrays.block_table
        views = self._send(parts)
        paged = PagedBatch(
            arrays.num_decodes, views[4].view(rows, -1), views[3],
            views[6].view(-1, 4) if tiles.size else None,
        )  # fmt: skip
        return StepInputs(views[0], views[1], views[2], paged, views[5])

    @staticmethod
    def _parts(sizes: tuple[int, ...]) -> list[slice]:
        """Places of the parts, each aligned to 16 bytes."""
        parts, at = [], 0
        for size in sizes:
            parts.append(slice(at, at + size))
            at += -(-size // 4) * 4
        return parts

    def _send(self, parts: list[slice]) -> list[torch.Tensor]:
        end = parts[-1].stop
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        return [self._device[part] for part in parts]
