"""Sums and joins over the ranks of a tensor-parallel group, through torch.distributed.

gloo between processes on CPUs, NCCL between NVIDIA GPUs, RCCL between AMD's by NCCL's name. A sum
adds the ranks' parts in the order of their numbers, in fp32, wherever an element stands: the order
of a library's all-reduce may depend on the element's place, and so on the batch. Knows no model and
no process.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

# Ranks meet within a step; only a rank that hangs keeps another one waiting for so long.
TIMEOUT_SECONDS = 300
# Up to here parts are gathered whole, in one exchange; above, each rank adds up a share of them.
_GATHER_BYTES = 2**18


class Collectives:
    """One rank's end of the process's group. All ranks must make the same calls in one order."""

    def __init__(self, rank: int, size: int, device: torch.device, ordered: bool = True) -> None:
        """ordered: sums have the same bits in every batch. Nothing is sent before `join`."""
        self.rank = rank
        self.size = size
        self._device = device
        # Two numbers have one sum, in whichever order.
        self._ordered = ordered and size > 2

    def join(self, store: Path) -> None:
        """Meet the other ranks over a file, on the loopback interface alone. Idempotent.

        Raises what torch.distributed raises when they do not come within TIMEOUT_SECONDS.
        """
        if distributed.is_initialized():
            return
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        on_gpu = self._device.type == "cuda"
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=distributed.FileStore(str(store), self.size),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
            device_id=self._device if on_gpu else None,
        )

    @staticmethod
    def leave() -> None:
        """Give the process's group up. Idempotent."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def add_up(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' parts, contiguous and of one shape, in place and on every rank."""
        if not self._ordered:
            distributed.all_reduce(part)
            return part
        num_bytes = part.numel() * part.element_size()
        if num_bytes <= _GATHER_BYTES or part.numel() % self.size:
            parts = part.new_empty(self.size, *part.shape)
            distributed.all_gather_into_tensor(parts.view(-1), part.view(-1))
            return part.copy_(_sum_in_order(parts))
        shares = part.new_empty(self.size, part.numel() // self.size)
        distributed.all_to_all_single(shares, part.view(self.size, -1))
        distributed.all_gather_into_tensor(part.view(-1), _sum_in_order(shares).to(part.dtype))
        return part

    def columns(self, part: torch.Tensor, count: int, out: torch.Tensor) -> torch.Tensor:
        """Join the ranks' columns [rows, share] into out [rows, count], on every rank."""
        parts = part.new_empty(self.size, *part.shape)
        distributed.all_gather_into_tensor(parts.view(-1), part.view(-1))
        rows, share = part.shape
        whole, rest = divmod(count, share)
        out[:, : whole * share].view(rows, whole, share).copy_(parts[:whole].transpose(0, 1))
        if rest:
            out[:, whole * share :].copy_(parts[whole, :, :rest])
        return out

    def columns_for_first(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """The ranks' columns [rows, share] joined to [rows, count] on rank 0; none elsewhere."""
        if self.rank:
            distributed.gather(part)
            return part[:0]
        parts = [torch.empty_like(part) for _ in range(self.size)]
        distributed.gather(part, parts)
        return torch.cat(parts, 1)[:, :count]

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        found = torch.tensor(value, dtype=torch.int64, device=self._device)
        distributed.all_reduce(found, distributed.ReduceOp.MIN)
        return int(found)


class Summed:
    """A map of which each rank computes a part: the results are added up."""

    def __init__(
        self, part: Callable[[torch.Tensor], torch.Tensor], collectives: Collectives
    ) -> None:
        self._part = part
        self._collectives = collectives

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, features of this rank] → [rows, out], the same on every rank."""
        return self._collectives.add_up(self._part(x))


class JoinedHead:
    """A head of which each rank computes some columns: logits for the first one, which samples."""

    def __init__(
        self,
        part: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
        collectives: Collectives,
    ) -> None:
        """part: gives as many columns on every rank."""
        self._part = part
        self._vocab_size = vocab_size
        self._collectives = collectives

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, hidden] → [rows, vocabulary] on rank 0, [0, …] elsewhere."""
        if not len(x):
            return x.new_empty(0, self._vocab_size)
        return self._collectives.columns_for_first(self._part(x), self._vocab_size)


def _sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """parts [ranks, …] → their sum in fp32, first rank first."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return total
