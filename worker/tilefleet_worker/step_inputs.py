"""A step's arrays as the device reads them, sent in one copy."""

import numpy as np
import numpy.typing as npt
import torch

from tilefleet_worker.attention.triton.backend import PagedBatch
from tilefleet_worker.attention.triton.prefill import query_tiles
from tilefleet_worker.fused_decoder import StepInputs
from tilefleet_worker.kernels.sampling import WORDS
from tilefleet_worker.request_table import SAMPLER
from tilefleet_worker.step_arrays import StepArrays


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
        self,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        tile_rows: int,
        newest: torch.Tensor,
    ) -> None:
        """newest: int32 [slots] on the device: the token that was last chosen for each slot."""
        self._width = max_blocks
        self._tile_rows = tile_rows
        self._limits = (max_tokens, max_rows, max_blocks, len(newest))
        self._newest = newest
        most_tiles = max_tokens // tile_rows + max_rows
        # Logits are wanted of any token of a scored prompt; each part may be padded by 3.
        size = 4 * max_tokens + (2 + max_blocks + WORDS) * max_rows + 4 * most_tiles + 3 * 8
        self._staging = Staging(size, newest.device)

    def decode(self, arrays: StepArrays | None, padded_rows: int) -> StepInputs:
        """Send decodes, padded to a number of rows; None sends padding alone, for a capture."""
        count = padded_rows
        rows = 0 if arrays is None else arrays.num_rows
        self._check(arrays, count)
        parts = self._parts((count, count, count, count, count * self._width, count * WORDS))
        host = self._staging.host()
        token_ids, positions, slots, contexts, table, samples = (host[part] for part in parts)
        for target, padding in ((token_ids, 0), (positions, 0), (slots, -1), (contexts, 0)):
            target[rows:] = padding
        chosen = 0
        if arrays is not None:
            token_ids[:rows], positions[:rows] = arrays.token_ids, arrays.positions
            slots[:rows], contexts[:rows] = arrays.slots, arrays.context_lens
            table.reshape(count, -1)[:rows, : arrays.block_table.shape[1]] = arrays.block_table
            chosen = len(arrays.samples)
            drawn = samples.view(SAMPLER)
            drawn[:chosen] = arrays.samples
            if arrays.logits_index is not None:  # the graph makes the logits of all rows
                drawn["logits_row"][:chosen] = arrays.logits_index[arrays.samples["logits_row"]]
        samples.reshape(count, WORDS)[chosen:, 0] = -1
        views = self._staging.send(parts)
        paged = PagedBatch(count, views[4].view(count, -1), views[3], None)
        return StepInputs(
            views[0], views[1], views[2], paged, None, self._newest, views[5].view(count, WORDS)
        )

    def mixed(self, arrays: StepArrays) -> StepInputs:
        """Send rows of any lengths as they are."""
        tokens, rows, index = len(arrays.token_ids), arrays.num_rows, arrays.logits_index
        self._check(arrays, rows)
        logits = 0 if index is None else len(index)
        lengths = np.where(np.arange(rows) < arrays.num_decodes, 0, arrays.lengths)
        tiles = query_tiles(lengths, arrays.context_lens, self._tile_rows, arrays.num_decodes)
        words = len(arrays.samples) * WORDS
        sizes = (tokens, tokens, tokens, rows, rows * self._width, logits, tiles.size, words)
        parts = self._parts(sizes)
        host = self._staging.host()
        for part, values in zip(
            parts,
            (arrays.token_ids, arrays.positions, arrays.slots, arrays.context_lens, None,
             index, tiles.reshape(-1), arrays.samples.view(np.int32)),
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
        return StepInputs(
            views[0], views[1], views[2], paged, None if index is None else views[5],
            self._newest, views[7].view(-1, WORDS),
        )  # fmt: skip

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
        tokens = width = slots = 0
        if arrays is not None:
            tokens, width = len(arrays.token_ids), arrays.block_table.shape[1]
            if len(arrays.samples):
                slots = int(arrays.samples["slot"].max()) + 1
        found = (max(tokens, rows), rows, width, slots)
        names = ("tokens", "rows", "blocks of a request", "slots")
        for name, value, limit in zip(names, found, self._limits, strict=True):
            if value > limit:
                raise StepTooLargeError(
                    f"a step has {value} {name}, but the runner was built for {limit}"
                )
