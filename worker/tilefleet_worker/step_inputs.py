"""A plan as the device reads it: laid out in numpy, sent in one copy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tilefleet_worker.attention.triton.backend import PagedBatch
from tilefleet_worker.attention.triton.prefill import query_tiles
from tilefleet_worker.fused_decoder import StepInputs
from tilefleet_worker.step import StepPlan

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A plan in arrays. Rows of one token first, then longer ones; tokens in that order."""

    order: Ints | None
    """Index in the plan of each row here; None: the order of the plan."""
    num_decodes: int
    token_ids: Ints  # [tokens]
    positions: Ints  # [tokens]
    slots: Ints  # [tokens]: block · block_size + place
    context_lens: Ints  # [rows]
    lengths: Ints  # [rows]
    block_table: Ints  # [rows, blocks of the widest]
    logits_index: Ints | None
    """Tokens whose logits are wanted, row by row; None: those of all tokens."""

    @property
    def num_rows(self) -> int:
        """Requests of the step."""
        return len(self.context_lens)

    @property
    def decode_only(self) -> bool:
        """True when every row is one token: such a step can be a captured graph."""
        return self.num_decodes == self.num_rows


def lay_out(plan: StepPlan, block_size: int) -> StepArrays:
    """Lay out a plan that has rows. Raises IndexError when a row reaches beyond its blocks."""
    table, ends = plan.table, plan.ends
    beyond = np.flatnonzero(ends > table.num_blocks[plan.slots] * block_size)
    if len(beyond):
        raise IndexError(f"request {plan.request_ids[beyond[0]]} reaches beyond its blocks")
    width = -(-int(ends.max()) // block_size)
    if bool((plan.lengths == 1).all() and plan.sample.all() and table.plain[plan.slots].all()):
        blocks = table.block_ids[plan.slots, :width]
        place = blocks[np.arange(len(plan)), plan.starts // block_size]
        return StepArrays(
            None, len(plan), table.last_token[plan.slots], plan.starts,
            place * block_size + plan.starts % block_size, ends, plan.lengths, blocks, None,
        )  # fmt: skip
    return _lay_out_rows(plan, width, block_size)


def _lay_out_rows(plan: StepPlan, width: int, block_size: int) -> StepArrays:
    """The general case: rows of any length, spelled out."""
    order = np.argsort(plan.lengths > 1, kind="stable")
    rows = [plan.rows[index] for index in order.tolist()]
    lengths, ends = plan.lengths[order], plan.ends[order]
    blocks = plan.table.block_ids[plan.slots[order], :width]
    row_of = np.repeat(np.arange(len(rows)), lengths)
    last = np.cumsum(lengths)  # tokens before the end of each row
    positions = np.arange(last[-1]) - (last - ends)[row_of]
    places = blocks[row_of, positions // block_size] * block_size + positions % block_size
    token_ids = np.fromiter((t for row in rows for t in row.token_ids), np.int64, int(last[-1]))
    wanted = [
        np.append(first + np.arange(len(row.targets)), [end - 1] * row.sample)
        for row, first, end in zip(rows, last - lengths, last, strict=True)
    ]
    return StepArrays(
        order, int((lengths == 1).sum()), token_ids, positions, places, ends, lengths, blocks,
        np.concatenate(wanted).astype(np.int64),
    )  # fmt: skip


class StepTooLargeError(IndexError):
    """A step does not fit what the runner was built for: scheduler and runner disagree."""


class Staging:
    """Pinned host buffers in turn before one device buffer, all int32.

    A copy waits behind the kernels launched before it, so its host buffer must stay as it is until
    the device has read it. Two, each with an event: the host fills one while the other is read. The
    device buffer needs no second one, since its readers and its next copy are on one stream.
    """

    _TURNS = 2

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._hosts = [
            torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(self._TURNS)
        ]
        self._read: list[torch.cuda.Event | None] = [None] * self._TURNS
        self._turn = 0
        self._on_gpu = on_gpu
        self._device = torch.zeros(size, dtype=torch.int32, device=device)

    def host(self) -> npt.NDArray[np.int32]:
        """The buffer to fill for the next `send`. Waits until the device has read it."""
        read = self._read[self._turn]
        if read is not None:
            read.synchronize()
        buffer: npt.NDArray[np.int32] = self._hosts[self._turn].numpy()
        return buffer

    def send(self, parts: list[slice]) -> list[torch.Tensor]:
        """Copy what was filled, up to the end of the last part. Returns the parts on the device."""
        end = parts[-1].stop
        if end > len(self._device):
            raise StepTooLargeError(
                f"the inputs of a step take {end} values, but the buffer has {len(self._device)}"
            )
        self._device[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
        if self._on_gpu:
            event = self._read[self._turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._read[self._turn] = event
        self._turn = (self._turn + 1) % self._TURNS
        return [self._device[part] for part in parts]


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
        self._limits = (max_tokens, max_rows, max_blocks)
        most_tiles = max_tokens // tile_rows + max_rows
        # Logits are wanted of any token of a scored prompt; each part may be padded by 3.
        size = 4 * max_tokens + (2 + max_blocks) * max_rows + 4 * most_tiles + 3 * 7
        self._staging = Staging(size, device)

    def decode(self, arrays: StepArrays | None, padded_rows: int) -> StepInputs:
        """Send decodes, padded to a number of rows; None sends padding alone, for a capture."""
        count = padded_rows
        rows = 0 if arrays is None else arrays.num_rows
        self._check(arrays, count)
        parts = self._parts((count, count, count, count, count * self._width))
        host = self._staging.host()
        token_ids, positions, slots, contexts, table = (host[part] for part in parts)
        for target, padding in ((token_ids, 0), (positions, 0), (slots, -1), (contexts, 0)):
            target[rows:] = padding
        if arrays is not None:
            token_ids[:rows], positions[:rows] = arrays.token_ids, arrays.positions
            slots[:rows], contexts[:rows] = arrays.slots, arrays.context_lens
            table.reshape(count, -1)[:rows, : arrays.block_table.shape[1]] = arrays.block_table
        views = self._staging.send(parts)
        paged = PagedBatch(count, views[4].view(count, -1), views[3], None)
        return StepInputs(views[0], views[1], views[2], paged, None)

    def mixed(self, arrays: StepArrays) -> StepInputs:
        """Send rows of any lengths as they are."""
        tokens, rows, index = len(arrays.token_ids), arrays.num_rows, arrays.logits_index
        self._check(arrays, rows)
        logits = 0 if index is None else len(index)
        lengths = np.where(np.arange(rows) < arrays.num_decodes, 0, arrays.lengths)
        tiles = query_tiles(lengths, arrays.context_lens, self._tile_rows, arrays.num_decodes)
        sizes = (tokens, tokens, tokens, rows, rows * self._width, logits, tiles.size)
        parts = self._parts(sizes)
        host = self._staging.host()
        for part, values in zip(
            parts,
            (arrays.token_ids, arrays.positions, arrays.slots, arrays.context_lens, None,
             index, tiles.reshape(-1)),
            strict=True,
        ):  # fmt: skip
            if values is not None:
                host[part] = values
        table = host[parts[4]].reshape(rows, -1)
        table[:, : arrays.block_table.shape[1]] = arrays.block_table
        views = self._staging.send(parts)
        paged = PagedBatch(
            arrays.num_decodes, views[4].view(rows, -1), views[3],
            views[6].view(-1, 4) if tiles.size else None,
        )  # fmt: skip
        return StepInputs(views[0], views[1], views[2], paged, None if index is None else views[5])

    @staticmethod
    def _parts(sizes: tuple[int, ...]) -> list[slice]:
        """Places of the parts, each aligned to 16 bytes."""
        parts, at = [], 0
        for size in sizes:
            parts.append(slice(at, at + size))
            at += -(-size // 4) * 4
        return parts

    def _check(self, arrays: StepArrays | None, rows: int) -> None:
        """Raise StepTooLargeError when the step has more than the buffer was made for."""
        tokens = width = 0
        if arrays is not None:
            tokens, width = len(arrays.token_ids), arrays.block_table.shape[1]
        found = (max(tokens, rows), rows, width)
        names = ("tokens", "rows", "blocks of a request")
        for name, value, limit in zip(names, found, self._limits, strict=True):
            if value > limit:
                raise StepTooLargeError(
                    f"a step has {value} {name}, but the runner was built for {limit}"
                )
