"""The block pool: every block in one state, counted right, whatever is done to it."""

import hashlib
import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.errors import ConfigError, EngineError
from tilefleet_worker.prefix_chain import PrefixChain, chain_root


class PoolMachine(RuleBasedStateMachine):
    """Requests come with short token lists over two letters, so that prefixes collide often.

    Blocks hold the hash of what was computed for them: what a hit brings must be just that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes | None] = {}
        self.on_host: dict[int, bytes | None] = {}

    @initialize(host_blocks=st.sampled_from([0, 1, 4, 30]))
    def build(self, host_blocks: int) -> None:
        self.pool = BlockPool(9, 2, host_blocks=host_blocks)

    def copy(self) -> None:
        for to_host, block, host_block in self.pool.take_transfers():
            if to_host:
                self.on_host[host_block] = self.contents[block]
            else:
                self.contents[block] = self.on_host[host_block]

    @rule(blocks=st.lists(st.sampled_from([(0, 0), (0, 1)]), min_size=1, max_size=5))
    def start(self, blocks: list[tuple[int, int]]) -> None:
        hashes = PrefixChain(self.pool.root("")).extend([t for block in blocks for t in block], 2)
        hits = self.pool.match(hashes)
        missing = len(blocks) - hits.num_spans
        if missing > self.pool.num_available - self.pool.num_taken_by(hits):
            return
        before = self.pool.num_available - self.pool.num_taken_by(hits)
        (known,) = self.pool.acquire(hits)
        assert set(hits.block_ids[0]) <= set(known)
        assert len(known) == hits.num_spans == len(hits.block_ids[0]) + hits.num_spans_on_host
        new = self.pool.allocate(missing)
        assert self.pool.num_available == before - missing
        assert not set(new) & {block for table in self.tables for block in table}
        self.copy()
        assert [self.contents[block] for block in known] == hashes[: len(known)]
        table = [*known, *new]
        for block, value in zip(table, hashes, strict=True):
            self.contents[block] = value
            self.pool.publish([block], [value])
        self.tables.append(table)
        found = self.pool.match(hashes)
        assert found.block_ids[0][: hits.num_spans] == known
        assert found.num_spans == len(hashes)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @rule(count=st.integers(0, 9))
    def take_private(self, count: int) -> None:
        if count > self.pool.num_available:
            with pytest.raises(EngineError, match="available"):
                self.pool.allocate(count)
            return
        self.tables.append(list(self.pool.allocate(count)))
        self.copy()
        self.contents.update(dict.fromkeys(self.tables[-1]))  # what it computes, nobody hits

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity([self.tables])
        if self.pool.host:
            held_there = self.pool.host.spans(0).items()
            assert all(self.on_host[block] == value for value, (block,) in held_there)
        held = {block for table in self.tables for block in table}
        assert self.pool.num_referenced == len(held)

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.num_available == self.pool.num_blocks


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def publish_chain(pool: BlockPool, blocks: tuple[int, ...], salt: str = "") -> list[bytes]:
    tokens = [index for index in range(len(blocks)) for _ in range(pool.block_size)]
    hashes = PrefixChain(pool.root(salt)).extend(tokens, pool.block_size)
    pool.publish(blocks, hashes)
    return hashes


def test_the_tail_of_a_freed_prefix_is_evicted_first() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(4)
    hashes = publish_chain(pool, blocks)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match(hashes).block_ids[0] == list(blocks[:3])
    pool.allocate(2)
    assert pool.match(hashes).block_ids[0] == [blocks[0]]


def test_a_prefix_used_lately_outlives_an_older_one() -> None:
    pool = BlockPool(4, 2)
    first, second = pool.allocate(2), pool.allocate(2)
    old = publish_chain(pool, first, "a")
    new = publish_chain(pool, second, "b")
    pool.release(second)
    pool.release(first)
    pool.acquire(pool.match(old))
    pool.release(first)
    pool.allocate(2)
    assert pool.match(old).block_ids[0] == list(first)
    assert pool.match(new).block_ids[0] == []


def test_what_was_evicted_comes_back_from_the_host_and_is_copied_there_once() -> None:
    pool = BlockPool(3, 2, host_blocks=4)
    blocks = pool.allocate(3)
    hashes = publish_chain(pool, blocks)
    pool.release(blocks)
    other = pool.allocate(2)
    assert [transfer[:2] for transfer in pool.take_transfers()] == [
        (True, blocks[2]),
        (True, blocks[1]),
    ]
    pool.release(other)
    hit = pool.match(hashes)
    assert (hit.num_spans, hit.num_spans_on_host) == (3, 2)
    assert pool.num_taken_by(hit) == 3
    (table,) = pool.acquire(hit)
    assert [transfer[:2] for transfer in pool.take_transfers()] == [(False, b) for b in table[1:]]
    pool.check_integrity([[table]])
    pool.release(table)
    pool.allocate(3)
    assert [transfer[:2] for transfer in pool.take_transfers()] == [(True, blocks[0])]


def test_the_host_forgets_what_was_used_longest_ago() -> None:
    pool = BlockPool(2, 2, host_blocks=2)
    chains = []
    for salt in "abc":
        blocks = pool.allocate(1)
        chains.append(publish_chain(pool, blocks, salt))
        pool.release(blocks)
    pool.release(pool.allocate(2))  # evicts b and c; a left before
    assert [pool.match(hashes).num_spans for hashes in chains] == [0, 1, 1]
    assert pool.host is not None
    assert pool.host.num_free == 0


def test_only_a_shared_block_survives_one_of_its_owners() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    hashes = publish_chain(pool, blocks)
    pool.acquire(pool.match(hashes[:1]))
    pool.release(blocks)
    assert pool.num_referenced == 1
    assert pool.num_idle == 1
    pool.check_integrity([[blocks[:1]]])


def test_salts_and_fingerprints_separate_equal_tokens() -> None:
    roots = {chain_root(*pair) for pair in (("m", ""), ("m", "a"), ("ma", ""), ("", "ma"))}
    assert len(roots) == 4


def test_the_chain_depends_on_order_and_on_everything_before() -> None:
    root = chain_root("m", "")
    chains = [(1, 2, 5, 6), (2, 1, 5, 6), (1, 3, 5, 6)]
    hashes = [PrefixChain(root).extend(tokens, 2) for tokens in chains]
    assert len({value for found in hashes for value in found}) == 6


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 5), st.integers(0, 8))
def test_a_chain_is_the_same_in_one_piece_and_in_pieces(
    tokens: list[int], block_size: int, first_blocks: int
) -> None:
    """A request's hashes are made when its blocks fill: the prompt's at once, the answer's later.
    Each is the SHA-256 of everything before it."""
    root, cut = chain_root("m", ""), first_blocks * block_size
    pieces = PrefixChain(root)
    made = [*pieces.extend(tokens[:cut], block_size), *pieces.extend(tokens[cut:], block_size)]
    ends = range(block_size, len(tokens) + 1, block_size)
    data = [struct.pack(f"<{end}I", *tokens[:end]) for end in ends]
    assert made == [hashlib.sha256(root + part).digest() for part in data]
    assert made == PrefixChain(root).extend(array("I", tokens), block_size)


def test_the_chain_is_stable_across_versions() -> None:
    """Replicas of different releases must agree, or change the format version on purpose."""
    (value,) = PrefixChain(chain_root("model", "salt")).extend((1, 2, 3, 4), 4)
    assert value.hex() == "30d66a1100bb44ba08f1b23c9c7a76c26f49f5eab0441355a7592a82687be39e"


def test_without_prefix_caching_nothing_is_ever_hit() -> None:
    pool = BlockPool(4, 2, prefix_caching=False)
    blocks = pool.allocate(2)
    hashes = publish_chain(pool, blocks)
    assert pool.match(hashes).block_ids[0] == []
    pool.release(blocks)
    assert pool.num_idle == 0


def test_a_second_release_is_an_error_and_changes_nothing() -> None:
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(EngineError, match="released twice"):
        pool.release(blocks)
    pool.check_integrity([[]])


def test_publishing_needs_an_owner_and_never_changes_a_hash() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(EngineError, match="without an owner"):
        pool.publish([0], [b"x"])
    (block,) = pool.allocate(1)
    pool.publish([block], [b"x"])
    with pytest.raises(EngineError, match="published twice"):
        pool.publish([block], [b"y"])


@pytest.mark.parametrize("fault", ["count", "index", "lost", "lost on the host", "ageless"])
def test_the_integrity_check_sees_a_fault(fault: str) -> None:
    pool = BlockPool(3, 2, host_blocks=2)
    host = pool.host
    assert host is not None
    host.save(0, b"evicted", [2])
    blocks = pool.allocate(2)
    publish_chain(pool, blocks)
    if fault == "count":
        pool._ref_counts[blocks[0]] += 1
    elif fault == "index":
        pool._head_of_hash[0].popitem()
    elif fault == "ageless":
        host.hold(0, [b"evicted"])
    elif fault == "lost on the host":
        host._free.clear()
    else:
        pool._free.clear()
    with pytest.raises(EngineError):
        pool.check_integrity([[blocks]])


def test_an_empty_pool_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="give the KV cache more memory"):
        BlockPool(0, 16)
