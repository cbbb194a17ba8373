"""Who owns which KV block, and which blocks hold a prefix that can be used again.

Blocks come and go in spans: those of one layer kind that hold the same tokens of a request. Every
span is in exactly one state: *referenced* (in the tables of one or more requests, or let go of
while a step under way may still use it) or *idle* (of nobody, but its tokens are published and may
be hit again); all other blocks are *free*, for any kind. Idle spans are evicted in
least-recently-used order when the free blocks run out. A span goes by the id of its first block,
its head. Host memory may keep copies of what is evicted. Knows no tensor and no request.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tilefleet_worker.errors import ConfigError, EngineError
from tilefleet_worker.host_cache import HostCache, Transfer
from tilefleet_worker.layer_kinds import FULL, LayerKind
from tilefleet_worker.prefix_chain import chain_root


class Hit(NamedTuple):
    """The longest known prefix of a chain."""

    num_spans: int
    """Spans of tokens that need not be computed."""
    block_ids: tuple[Sequence[int], ...]
    """Of each kind, the blocks that the token after them still sees: of a window the last ones."""
    on_host: tuple[dict[int, bytes], ...] = ()
    """Of each kind, spans missing among those blocks that host memory has: number → hash."""

    @property
    def num_spans_on_host(self) -> int:
        """Spans of tokens that need a copy from the host in any kind."""
        return len(set().union(*self.on_host))


class BlockPool:
    """A fixed number of blocks with reference counts, a prefix index and an LRU of idle spans.

    kinds: layer kinds of the model. token_bytes: bytes of one token in one block. host_blocks:
    blocks of host memory for evicted prefixes; then `take_transfers` must be obeyed.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        kinds: tuple[LayerKind, ...] = (FULL,),
        token_bytes: int = 1,
        prefix_caching: bool = True,
        fingerprint: str = "",
        host_blocks: int = 0,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"A pool of {num_blocks} blocks of {block_size} tokens holds nothing: give the KV "
                "cache more memory."
            )
        self.host = HostCache(host_blocks, len(kinds)) if host_blocks and prefix_caching else None
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.kinds = kinds
        self.token_bytes = token_bytes
        self.prefix_caching = prefix_caching
        self.num_used_spans = [0] * len(kinds)
        """Referenced spans of each kind, shared ones counted once."""
        self.num_idle_spans = [0] * len(kinds)
        self._fingerprint = fingerprint
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._head_of_hash: tuple[dict[bytes, int], ...] = tuple({} for _ in kinds)
        # Of spans wider than a block: head → the others. Of idle spans: head → kind.
        self._others: dict[int, tuple[int, ...]] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, int] = OrderedDict()
        self._num_begun = 0
        self._num_ended = 0
        # (steps begun when they were released, blocks, kind): see release().
        self._deferred: deque[tuple[int, list[int], int]] = deque()

    @property
    def spare_block_id(self) -> int:
        """Stands in tables for blocks that left the window: no request's, see KVCache."""
        return self.num_blocks

    @property
    def num_idle(self) -> int:
        """Blocks of nobody whose prefix can still be hit."""
        return sum(k.width * n for k, n in zip(self.kinds, self.num_idle_spans, strict=True))

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free and idle ones."""
        return len(self._free) + self.num_idle

    @property
    def num_referenced(self) -> int:
        """Blocks in the table of at least one request, or kept for a step under way."""
        return self.num_blocks - self.num_available

    @property
    def num_steps_under_way(self) -> int:
        """Steps that were begun and have not ended."""
        return self._num_begun - self._num_ended

    @property
    def num_deferred(self) -> int:
        """References given up that count until the steps that may use them have ended."""
        return sum(len(blocks) for _, blocks, _ in self._deferred)

    def begin_step(self) -> None:
        """Note that a step begins which uses blocks: what is released from now on outlives it."""
        self._num_begun += 1

    def end_step(self) -> None:
        """Note that a step ended, and give back what waited for it."""
        self._num_ended += 1
        while self._deferred and self._deferred[0][0] <= self._num_ended:
            _, blocks, index = self._deferred.popleft()
            self._give_back(blocks, index)

    def root(self, cache_salt: str) -> bytes:
        """Start of the hash chain of requests with this salt."""
        return chain_root(self._fingerprint, cache_salt)

    def match(self, hashes: Sequence[bytes]) -> Hit:
        """The longest known prefix of a chain. Changes nothing.

        It must be known to every kind: whole to full attention, and to a window as much of its end
        as the next token sees.
        """
        length = len(hashes) if self.prefix_caching else 0
        for index, kind in enumerate(self.kinds):
            if not kind.window:
                knows = self._knows(index)
                unknown = (i for i, value in enumerate(hashes[:length]) if not knows(value))
                length = next(unknown, length)
        if len(self.kinds) > 1 or self.kinds[0].window:
            length = self._seen_by_windows(hashes, length)
        indices = range(len(self.kinds))
        return Hit(
            length,
            tuple(self._blocks(index, hashes, length) for index in indices),
            tuple(self._on_host(index, hashes, length) for index in indices) if self.host else (),
        )

    def _knows(self, index: int) -> Callable[[bytes], bool]:
        """Whether a span of kind `index` can be hit, on the device or on the host."""
        heads = self._head_of_hash[index]
        if self.host is None:
            return heads.__contains__
        on_host = self.host.spans(index)
        return lambda value: value in heads or value in on_host

    def _seen_by_windows(self, hashes: Sequence[bytes], length: int) -> int:
        """The most spans, up to `length`, whose ends are known as far as each window reaches."""
        fits = [True] * (length + 1)
        for index, kind in enumerate(self.kinds):
            known, knows = 0, self._knows(index)
            for end in range(1, length + 1 if kind.window else 0):
                known = known + 1 if knows(hashes[end - 1]) else 0
                seen = end - kind.first_span(end * self.block_size, self.block_size)
                fits[end] &= known >= seen
        return next(end for end in range(length, -1, -1) if fits[end])

    def _blocks(self, index: int, hashes: Sequence[bytes], length: int) -> Sequence[int]:
        kind, heads = self.kinds[index], self._head_of_hash[index]
        first = kind.first_span(length * self.block_size, self.block_size)
        found = [heads[value] for value in hashes[first:length] if value in heads]
        return found if kind.width == 1 else [b for head in found for b in self._span(head)]

    def _on_host(self, index: int, hashes: Sequence[bytes], length: int) -> dict[int, bytes]:
        kind, heads = self.kinds[index], self._head_of_hash[index]
        first = kind.first_span(length * self.block_size, self.block_size)
        return {span: hashes[span] for span in range(first, length) if hashes[span] not in heads}

    def _span(self, head: int) -> tuple[int, ...]:
        return (head, *self._others.get(head, ()))

    def num_holders(self, head: int) -> int:
        """Requests that hold the span of this head."""
        return self._ref_counts[head]

    def num_taken_by(self, hit: Hit) -> int:
        """How many fewer blocks are available once a hit is acquired: idle ones, and those that
        its spans on the host are copied to.
        """
        taken = 0
        for kind, block_ids in zip(self.kinds, hit.block_ids, strict=True):
            heads = block_ids[:: kind.width]
            taken += kind.width * sum(1 for head in heads if self._ref_counts[head] == 0)
        for kind, missing in zip(self.kinds, hit.on_host, strict=False):
            taken += kind.width * len(missing)
        return taken

    def acquire(self, hit: Hit) -> tuple[Sequence[int], ...]:
        """Add one reference to each span found by `match`; those on the host get blocks first.

        Returns the blocks of each kind, span by span. Raises EngineError when too few are
        available: the caller must compare `num_available` with `num_taken_by`.
        """
        for index, block_ids in enumerate(hit.block_ids):
            for head in block_ids[:: self.kinds[index].width]:
                if self._ref_counts[head] == 0:
                    del self._idle[head]
                    self.num_idle_spans[index] -= 1
                    self.num_used_spans[index] += 1
                self._ref_counts[head] += 1
        return self._bring_back(self.host, hit) if self.host else hit.block_ids

    def _bring_back(self, host: HostCache, hit: Hit) -> tuple[Sequence[int], ...]:
        """The blocks of a hit with those in between that its spans on the host are copied to."""
        for index, missing in enumerate(hit.on_host):
            host.hold(index, missing.values())
        tables = []
        for index, (block_ids, missing) in enumerate(zip(hit.block_ids, hit.on_host, strict=True)):
            width, blocks = self.kinds[index].width, list(block_ids)
            first = hit.num_spans - len(blocks) // width - len(missing)
            for span, value in missing.items():  # in rising order
                taken = self.allocate(1, index)
                host.load(index, value, taken)
                self.publish(taken, [value], index)
                blocks[(span - first) * width : (span - first) * width] = taken
            tables.append(blocks)
        return tuple(tables)

    def take_transfers(self) -> list[Transfer]:
        """Blocks to copy, all and in this order, before the next step that is begun."""
        return self.host.take_transfers() if self.host else []

    def allocate(self, count: int, index: int = 0) -> tuple[int, ...]:
        """Take `count` spans of kind `index`, one reference each: their blocks, span by span.

        Idle spans are evicted, oldest first. Raises EngineError when too few blocks are available:
        the caller must check `num_available`.
        """
        width = self.kinds[index].width
        if count * width > self.num_available:
            raise EngineError(
                f"{count * width} blocks asked of a pool with {self.num_available} available"
            )
        while len(self._free) < count * width:
            self._evict()
        taken = tuple(self._free.pop() for _ in range(count * width))
        for start in range(0, len(taken), width):
            self._ref_counts[taken[start]] = 1
            if width > 1:
                self._others[taken[start]] = taken[start + 1 : start + width]
        self.num_used_spans[index] += count
        return taken

    def _evict(self) -> None:
        """Free the blocks of the span that is idle for longest."""
        head, index = self._idle.popitem(last=False)
        self.num_idle_spans[index] -= 1
        value = self._hashes[head]
        if value is not None:
            del self._head_of_hash[index][value]
            self._hashes[head] = None
            if self.host:
                self.host.save(index, value, self._span(head))
        self._set_free(head)

    def _set_free(self, head: int) -> None:
        self._free.append(head)
        if self._others:
            self._free.extend(self._others.pop(head, ()))

    def publish(self, block_ids: Sequence[int], hashes: Sequence[bytes], index: int = 0) -> None:
        """Make full spans of kind `index` findable. The first of a hash wins; a second stays
        private.

        A published block is never written again. Raises EngineError for a span of nobody, or one
        published as something else.
        """
        if not self.prefix_caching:
            return
        known_heads = self._head_of_hash[index]
        heads = block_ids[:: self.kinds[index].width]
        for head, value in zip(heads, hashes, strict=True):
            if self._ref_counts[head] < 1:
                raise EngineError(f"block {head} was published without an owner")
            known = self._hashes[head]
            if known is not None and known != value:
                raise EngineError(f"block {head} was published twice with different tokens")
            if known is None and value not in known_heads:
                self._hashes[head] = value
                known_heads[value] = head

    def release(self, block_ids: Sequence[int], index: int = 0) -> None:
        """Drop one reference of each span of kind `index` in a request's table, tail first.

        Tail first, because the oldest idle span is evicted first and a prefix without its head
        cannot be hit. While steps are under way the references stay until the newest of them has
        ended: the device may use the blocks that long. Raises EngineError when a block has no
        reference left to drop.
        """
        if self.num_steps_under_way:
            self._deferred.append((self._num_begun, list(block_ids), index))
        else:
            self._give_back(block_ids, index)

    def _give_back(self, block_ids: Sequence[int], index: int) -> None:
        for head in reversed(block_ids[:: self.kinds[index].width]):
            if self._ref_counts[head] < 1:
                raise EngineError(f"block {head} was released twice")
            self._ref_counts[head] -= 1
            if self._ref_counts[head] == 0:
                self.num_used_spans[index] -= 1
                if self._hashes[head] is None:
                    self._set_free(head)
                else:
                    self._idle[head] = index
                    self.num_idle_spans[index] += 1

    def check_integrity(self, tables: Sequence[Iterable[Sequence[int]]]) -> None:
        """Raise EngineError unless counts, sets and index agree with the tables of all requests.

        tables: for each kind the blocks that each request holds.
        """
        if self.host:
            self.host.check_integrity()
        if self._deferred and not self.num_steps_under_way:
            raise EngineError("released blocks wait for a step although none is under way")
        free = set(self._free)
        if len(free) != len(self._free) or free & set(self._idle):
            raise EngineError("a block is free or idle more than once")
        homes = Counter(free)
        for head in self._idle:
            if self._hashes[head] is None:
                raise EngineError(f"block {head} is idle without a hash")
            homes.update(self._span(head))
        for index, kind_tables in enumerate(tables):
            waiting = [blocks for _, blocks, kind in self._deferred if kind == index]
            homes.update(self._check_kind(index, [*kind_tables, *waiting]))
        for block in range(self.num_blocks):
            if homes[block] != 1:
                raise EngineError(f"block {block} has {homes[block]} homes: free, idle or a span")
            if block in free and (self._ref_counts[block] or self._hashes[block] is not None):
                raise EngineError(f"block {block} is free with a reference or a hash")
        indexed = {head: value for heads in self._head_of_hash for value, head in heads.items()}
        published = {b: value for b, value in enumerate(self._hashes) if value is not None}
        if indexed != published or len(indexed) != sum(map(len, self._head_of_hash)):
            raise EngineError("the prefix index and the hashes of blocks disagree")

    def _check_kind(self, index: int, tables: Iterable[Sequence[int]]) -> Iterable[int]:
        """Check the spans of one kind. Returns the blocks that are referenced, each once."""
        width = self.kinds[index].width
        spans = Counter(
            tuple(table[at : at + width]) for table in tables for at in range(0, len(table), width)
        )
        for span, count in spans.items():
            if span != self._span(span[0]) or len(span) != width:
                raise EngineError(f"blocks {span} are in a table, but are not one span")
            if self._ref_counts[span[0]] != count:
                held = self._ref_counts[span[0]]
                raise EngineError(f"block {span[0]}: {held} references, {count} holders")
        idle = [head for head, kind in self._idle.items() if kind == index]
        if any(self._ref_counts[head] for head in idle):
            raise EngineError("an idle block has references")
        if (len(spans), len(idle)) != (self.num_used_spans[index], self.num_idle_spans[index]):
            raise EngineError(f"the spans of kind {self.kinds[index].name} are counted wrong")
        return [block for span in spans for block in span]
