"""What the memory of the KV pool is used for, in bytes that sum to the pool. Pure."""

from dataclasses import dataclass

import numpy as np

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.layer_kinds import LayerKind
from tilefleet_worker.request_table import Ints, KindTable, RequestTable


@dataclass(frozen=True, slots=True)
class KindBytes:
    """Bytes of the blocks that one layer kind holds, by cause."""

    kind: str
    """`full`, or `window-` and its tokens."""
    live: int = 0
    """Computed keys and values that a running request still reads; shared ones count once."""
    reserved: int = 0
    """Places of tokens that running requests have and have not computed yet."""
    cached: int = 0
    """Prefixes of nobody, kept to be hit again until their blocks are needed."""
    wasted: int = 0
    """Places in blocks of running requests behind their last token, or that left the window."""
    on_host: int = 0
    """Evicted prefixes in the host's memory, kept to be copied back: no bytes of the pool."""


@dataclass(frozen=True, slots=True)
class PoolBytes:
    """All bytes of the pool. kinds, free and spare sum to total.

    The host's memory for evicted prefixes is counted beside it: on_host of kinds and host_free sum
    to host_total.
    """

    kinds: tuple[KindBytes, ...] = ()
    free: int = 0
    """Blocks that hold nothing."""
    spare: int = 0
    """The block of self-checks and padding."""
    total: int = 0
    host_free: int = 0
    host_total: int = 0

    def by_cause(self) -> dict[str, int]:
        """Bytes over all kinds: live, reserved, cached, wasted, free, spare. They sum to total."""
        causes = ("live", "reserved", "cached", "wasted")
        sums = {cause: sum(getattr(kind, cause) for kind in self.kinds) for cause in causes}
        return {**sums, "free": self.free, "spare": self.spare}

    def host_by_cause(self) -> dict[str, int]:
        """Bytes of the host's memory: cached and free. They sum to host_total."""
        return {"cached": sum(kind.on_host for kind in self.kinds), "free": self.host_free}


EMPTY_POOL = PoolBytes()


def accounting(pool: BlockPool, table: RequestTable, slots: Ints) -> PoolBytes:
    """Bytes of the pool by cause and layer kind, for the running requests in `slots`.

    A few operations on whole arrays, so that it can be asked after every step. The sum holds by
    construction where `live` is concerned; that each cause is right is checked block by block in
    the tests. wasted is at most one span of each kind and request. Of a window it is less than two
    while a prompt is partly computed, or where the block size does not divide the window: then both
    its ends may lie inside a block.
    """
    kinds = []
    for index, kind in enumerate(pool.kinds):
        held, size = table.kinds[index], pool.block_size
        computed = table.num_computed[slots]
        room = held.num_spans[slots] * size
        # Tokens of steps under way, drafts among them, have their places too.
        known = np.maximum(
            table.num_tokens[slots] + table.num_ahead[slots], table.num_scheduled[slots]
        )
        reserved = int((np.minimum(known, room) - computed).sum())
        wasted = int(np.maximum(room - known, 0).sum())
        if kind.window:
            wasted += _left_window(pool, kind, held, slots, computed)
        live = pool.num_used_spans[index] * size - reserved - wasted
        cached = pool.num_idle_spans[index] * size
        on_host = pool.host.num_spans(index) * size if pool.host else 0
        token_bytes = kind.width * pool.token_bytes
        amounts = [tokens * token_bytes for tokens in (live, reserved, cached, wasted, on_host)]
        kinds.append(KindBytes(kind.name, *amounts))
    block_bytes = pool.block_size * pool.token_bytes
    free = pool.num_available - pool.num_idle
    total = (pool.num_blocks + 1) * block_bytes
    host_free = pool.host.num_free if pool.host else 0
    host_blocks = pool.host.num_blocks if pool.host else 0
    return PoolBytes(
        tuple(kinds), free * block_bytes, block_bytes, total, host_free * block_bytes,
        host_blocks * block_bytes,
    )  # fmt: skip


def _left_window(
    pool: BlockPool, kind: LayerKind, held: KindTable, slots: Ints, computed: Ints
) -> int:
    """Tokens in first spans that no query will see again, of spans that none needs whole."""
    has = held.num_spans[slots] > held.first_span[slots]
    slots, computed = slots[has], computed[has]
    first = held.first_span[slots]
    gone = np.clip(computed - kind.window + 1 - first * pool.block_size, 0, pool.block_size)
    heads = held.block_ids[slots, first * kind.width]
    least: dict[int, tuple[int, int]] = {}
    for head, tokens in zip(heads.tolist(), gone.tolist(), strict=True):
        count, fewest = least.get(head, (0, tokens))
        least[head] = (count + 1, min(fewest, tokens))
    # A holder for which the span is not the first one needs all of it.
    return sum(tokens for head, (count, tokens) in least.items() if pool.num_holders(head) == count)
