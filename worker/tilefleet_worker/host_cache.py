"""Which spans of evicted prefixes the host's memory holds, and which copies bring them there.

A span that the pool evicts is copied to host blocks; when its prefix is hit again, it is copied
back. Where host blocks run out, the span that was used longest ago goes. A span that was copied
back stays here as well, so that its next eviction copies nothing.

Copies are only listed here. Whoever knows the device makes them, all of them and in this order,
before the next step: then no copy reads a block that was overwritten, and nothing need be locked.
Knows no tensor and no request.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from tilefleet_worker.errors import EngineError


class Transfer(NamedTuple):
    """One block to copy."""

    to_host: bool
    """From the device to the host, or back."""
    device_block: int
    host_block: int


class HostCache:
    """A fixed number of host blocks, with an index of their spans and an LRU."""

    def __init__(self, num_blocks: int, num_kinds: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._spans: tuple[dict[bytes, tuple[int, ...]], ...] = tuple({} for _ in range(num_kinds))
        # (kind, hash) of all spans but those being copied back, the longest unused first.
        self._by_age: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        self._transfers: list[Transfer] = []

    @property
    def num_free(self) -> int:
        """Host blocks that hold nothing."""
        return len(self._free)

    def num_spans(self, index: int) -> int:
        """Spans of kind `index` held here."""
        return len(self._spans[index])

    def spans(self, index: int) -> Mapping[bytes, tuple[int, ...]]:
        """Host blocks of each span of kind `index`, by its hash."""
        return self._spans[index]

    def save(self, index: int, value: bytes, device_blocks: Sequence[int]) -> None:
        """Keep a span of kind `index` that is about to leave these blocks of the device."""
        if value in self._spans[index]:
            self._by_age.move_to_end((index, value))
            return
        while len(self._free) < len(device_blocks):
            if not self._by_age:
                return  # all that is here is just being copied back, or it is less than a span
            oldest, oldest_value = self._by_age.popitem(last=False)[0]
            self._free.extend(self._spans[oldest].pop(oldest_value))
        taken = tuple(self._free.pop() for _ in device_blocks)
        self._spans[index][value] = taken
        self._by_age[index, value] = None
        self._list(True, device_blocks, taken)

    def hold(self, index: int, values: Collection[bytes]) -> None:
        """Keep these spans until `load`, whatever is saved in between."""
        for value in values:
            del self._by_age[index, value]

    def load(self, index: int, value: bytes, device_blocks: Sequence[int]) -> None:
        """Copy a span back, to these blocks of the device. It was held; now it is the newest."""
        self._by_age[index, value] = None
        self._list(False, device_blocks, self._spans[index][value])

    def _list(self, to_host: bool, device: Sequence[int], host: Sequence[int]) -> None:
        pairs = zip(device, host, strict=True)
        self._transfers += [Transfer(to_host, *pair) for pair in pairs]

    def take_transfers(self) -> list[Transfer]:
        """The copies listed since the last call. The caller must make them in this order."""
        transfers, self._transfers = self._transfers, []
        return transfers

    def check_integrity(self) -> None:
        """Raise EngineError unless every host block is free or in one span, and every span ages."""
        spans = [blocks for held in self._spans for blocks in held.values()]
        blocks = sorted([*self._free, *(block for span in spans for block in span)])
        if blocks != list(range(self.num_blocks)):
            raise EngineError("a host block is lost, or used twice")
        keys = {(index, value) for index, held in enumerate(self._spans) for value in held}
        if keys != set(self._by_age):
            raise EngineError("a span on the host can never be evicted, or is not there")
