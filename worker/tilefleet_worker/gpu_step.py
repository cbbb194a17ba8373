"""A step on its way through a GPU: what the host keeps of it until its tokens arrive."""

from dataclasses import dataclass, replace

import torch

from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.sampler import sample
from tilefleet_worker.step import StepResult, StepRow
from tilefleet_worker.step_arrays import StepArrays


class Mailbox:
    """Pinned host memory in turn for the tokens of the steps under way, of which there are two."""

    _TURNS = 2

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffers = [
            torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu)
            for _ in range(self._TURNS)
        ]
        self._turn = 0

    def receive(self, tokens: torch.Tensor) -> torch.Tensor:
        """Copy tokens to the host behind all that was launched. Read it when that has ended."""
        self._turn = (self._turn + 1) % self._TURNS
        target = self._buffers[self._turn][: len(tokens)]
        target.copy_(tokens, non_blocking=True)
        return target

    def receive_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The same for logits, into memory of their own."""
        target = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=self._on_gpu)
        return target.copy_(logits, non_blocking=True)

    def arrival(self) -> torch.cuda.Event | None:
        """An event behind all copies so far; None where they are done already."""
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """Its tokens arrive in `tokens`; rows that the host must choose for bring their logits."""

    tokens: torch.Tensor  # int32 [rows that the device chose for]
    request_ids: list[str]
    arrays: StepArrays
    cache: KVCache
    host_rows: tuple[StepRow, ...]
    host_logits: torch.Tensor | None
    arrived: torch.cuda.Event | None

    def result(self) -> StepResult:
        """Wait for the step. Call it before the launch after the next one."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values = self.tokens.tolist()
        result = StepResult(dict(zip(self.request_ids, values, strict=True)))
        if values and min(values) < 0:
            result = self._with_faults(values)
        if self.host_logits is None:
            return result
        mine = sample(self.host_logits, self.host_rows)
        for row in self.host_rows:
            if row.request_id in mine.faults:
                self.cache.scrub(row.block_ids)
        return replace(
            mine, tokens={**result.tokens, **mine.tokens}, faults={**result.faults, **mine.faults}
        )

    def _with_faults(self, values: list[int]) -> StepResult:
        """Name the rows without a token, and clean what they left in their blocks."""
        tokens, faults = {}, {}
        for index, (request_id, value) in enumerate(zip(self.request_ids, values, strict=True)):
            if value >= 0:
                tokens[request_id] = value
                continue
            end = int(self.arrays.samples["position"][index])
            faults[request_id] = f"the model's logits are not finite at position {end}"
            row = self.arrays.row_of(index)
            blocks = self.arrays.block_table[row, : self.cache.num_blocks_of(end)]
            self.cache.scrub(blocks.tolist())
        return StepResult(tokens, faults)
