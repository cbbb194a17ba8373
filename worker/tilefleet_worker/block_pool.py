"""Who owns which KV block, and which blocks hold a prefix that can be used again.

Every block is in exactly one state: *referenced* (in the tables of one or more requests), *idle*
(of nobody, but its tokens are published and may be hit again) or *free*. Idle blocks are evicted
in least-recently-used order when the free ones run out. Knows no tensor and no request.
"""

import hashlib
import struct
import sys
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from tilefleet_worker.errors import ConfigError, EngineError

_FORMAT_VERSION = "tilefleet-kv-1"


def chain_root(fingerprint: str, cache_salt: str) -> bytes:
    """Hash from which the chain of a request starts.

    fingerprint: what makes KV values of two engines differ (model, dtype, layout, rope). The salt
    sits here, so that every block of one tenant differs from every block of another. Fields are
    length-prefixed: ("ab", "c") and ("a", "bc") have different roots.
    """
    digest = hashlib.sha256()
    for text in (_FORMAT_VERSION, fingerprint, cache_salt):
        data = text.encode()
        digest.update(struct.pack("<I", len(data)))
        digest.update(data)
    return digest.digest()


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block: SHA-256 of its parent's hash and its tokens as uint32, little endian.

    SHA-256 and not a fast hash: a collision would serve one tenant's context to another.
    """
    return extend_chain(parent, token_ids, len(token_ids))[0]


def extend_chain(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of consecutive full blocks; what is left over at the end has none.

    All tokens become bytes at once, for nothing if they come as array("I"): a block then costs
    little more than its SHA-256.
    """
    tokens = token_ids if isinstance(token_ids, array) else array("I", token_ids)
    if sys.byteorder == "big":
        tokens = array("I", tokens)
        tokens.byteswap()
    if len(tokens) < block_size:
        return []
    whole = memoryview(tokens)[: len(tokens) // block_size * block_size]
    hashes, sha256 = [], hashlib.sha256
    for (block,) in struct.iter_unpack(f"{tokens.itemsize * block_size}s", whole.cast("B")):
        parent = sha256(parent + block).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """A fixed number of blocks with reference counts, a prefix index and an LRU of idle blocks."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        fingerprint: str = "",
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"A pool of {num_blocks} blocks of {block_size} tokens holds nothing: give the KV "
                "cache more memory."
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._fingerprint = fingerprint
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Blocks of nobody whose prefix can still be hit."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_referenced(self) -> int:
        """Blocks in the table of at least one request."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def root(self, cache_salt: str) -> bytes:
        """Start of the hash chain of requests with this salt."""
        return chain_root(self._fingerprint, cache_salt)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of a chain. Changes nothing."""
        blocks: list[int] = []
        if not self.prefix_caching:
            return blocks
        for value in hashes:
            block = self._block_of_hash.get(value)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_idle_of(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are idle, so that acquiring them makes fewer available."""
        return sum(1 for block in block_ids if self._ref_counts[block] == 0)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block found by `match`."""
        for block in block_ids:
            self._idle.pop(block, None)
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take `count` blocks with one reference each; idle ones are evicted, oldest first.

        Raises EngineError when fewer are available: the caller must check `num_available`.
        """
        if count > self.num_available:
            raise EngineError(f"{count} blocks asked of a pool with {self.num_available} available")
        return tuple(self._take() for _ in range(count))

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            value = self._hashes[block]
            if value is not None:
                del self._block_of_hash[value]
                self._hashes[block] = None
        self._ref_counts[block] = 1
        return block

    def publish(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Make full blocks findable. The first block of a hash wins; a second stays private.

        A published block is never written again. Raises EngineError for a block of nobody, or one
        published as something else.
        """
        if not self.prefix_caching:
            return
        for block, value in zip(block_ids, hashes, strict=True):
            if self._ref_counts[block] < 1:
                raise EngineError(f"block {block} was published without an owner")
            known = self._hashes[block]
            if known is not None and known != value:
                raise EngineError(f"block {block} was published twice with different tokens")
            if known is None and value not in self._block_of_hash:
                self._hashes[block] = value
                self._block_of_hash[value] = block

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each block of a request's table, tail first.

        Tail first, because the oldest idle block is evicted first and a prefix without its head
        cannot be hit. Raises EngineError when a block has no reference left to drop.
        """
        for block in reversed(block_ids):
            if self._ref_counts[block] < 1:
                raise EngineError(f"block {block} was released twice")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise EngineError unless counts, sets and index agree with the tables of all requests."""
        expected = Counter(block for table in tables for block in table)
        free, idle = set(self._free), set(self._idle)
        if len(free) != len(self._free) or free & idle:
            raise EngineError("a block is free or idle more than once")
        for block in range(self.num_blocks):
            count = self._ref_counts[block]
            if count != expected[block]:
                raise EngineError(f"block {block}: {count} references, {expected[block]} holders")
            if (count == 0) != (block in free or block in idle):
                raise EngineError(f"block {block}: {count} references, but free or idle is wrong")
            if (block in idle) and self._hashes[block] is None:
                raise EngineError(f"block {block} is idle without a hash")
            if (block in free) and self._hashes[block] is not None:
                raise EngineError(f"block {block} is free with a hash")
        index = {block: value for value, block in self._block_of_hash.items()}
        published = {b: value for b, value in enumerate(self._hashes) if value is not None}
        if index != published or len(index) != len(self._block_of_hash):
            raise EngineError("the prefix index and the hashes of blocks disagree")
