"""Captured graphs of decode steps: one launch instead of hundreds, one a batch size."""

from collections.abc import Callable

import torch


def padded_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that get a graph: 1, 2, 4, then steps of 8 to 64 and of 32 above, ascending."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


class DecodeGraphs:
    """Graphs by padded batch size over one memory pool. A replay reads and writes static memory.

    memory_bytes: what the captures took, measured.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.sizes = padded_sizes(max_rows)
        self.memory_bytes = 0
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def padded(self, rows: int) -> int:
        """The smallest captured size that holds `rows`."""
        return next(size for size in self.sizes if size >= rows)

    def capture(self, size: int, forward: Callable[[], torch.Tensor]) -> None:
        """Record a forward pass whose inputs are static. Runs it once before, on the side."""
        before = torch.cuda.mem_get_info(self._device)[0]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            forward()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            logits = forward()
        self._graphs[size] = graph, logits
        self.memory_bytes += max(0, before - torch.cuda.mem_get_info(self._device)[0])

    def replay(self, size: int, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Logits of a step whose inputs are in static memory. Without a graph it runs plainly."""
        captured = self._graphs.get(size)
        if captured is None:
            return forward()
        graph, logits = captured
        graph.replay()
        return logits
