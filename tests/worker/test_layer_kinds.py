"""Layer kinds share one pool: nothing is padded, nothing is lost, and windows let go."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.memory_runner import MemoryRunner
from tests.worker.pool_oracle import check_accounting, check_sums
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.layer_kinds import FULL, CacheLayout, Demand, LayerKind
from tilefleet_worker.prefix_chain import PrefixChain
from tilefleet_worker.request import Request, SamplingParams
from tilefleet_worker.scheduler import Scheduler

VOCAB = 97


@given(windows=st.lists(st.sampled_from([0, 8, 24]), min_size=1, max_size=40))
def test_every_layer_has_a_place_of_its_own_and_no_place_is_empty(windows: list[int]) -> None:
    layout = CacheLayout.of(windows, 100)
    num_tables = sum(kind.width for kind in layout.kinds)
    places = set(zip(layout.tables, layout.places, strict=True))
    assert len(places) == len(windows) == num_tables * layout.layers_per_block
    kinds = [kind for kind in layout.kinds for _ in range(kind.width)]
    assert [kinds[table].window for table in layout.tables] == windows


@pytest.mark.parametrize(
    ("windows", "length", "expected"),
    [
        ([0] * 28, 4096, [("full", 1)]),
        ([4096] * 32, 32768, [("window-4096", 1)]),
        ([4096] * 32, 4096, [("full", 1)]),
        ([*[512] * 5, 0] * 4 + [512] * 2, 32768, [("full", 2), ("window-512", 11)]),
        ([128, 0] * 18, 131072, [("full", 1), ("window-128", 1)]),
    ],
    ids=["Llama", "Mistral v0.1", "window never left", "Gemma 3 1B", "gpt-oss"],
)
def test_layouts_of_known_models(
    windows: list[int], length: int, expected: list[tuple[str, int]]
) -> None:
    layout = CacheLayout.of(windows, length)
    assert [(kind.name, kind.width) for kind in layout.kinds] == expected


@pytest.mark.parametrize(
    ("kinds", "blocks", "host_blocks", "steps"),
    [
        ((FULL,), 24, 0, 1_000),
        ((FULL, LayerKind("window-8", 8, 2)), 31, 40, 10_000),
        ((FULL, LayerKind("window-9", 9)), 24, 7, 1_000),
    ],
    ids=["full", "aligned window, host", "unaligned window, small host"],
)
def test_bytes_by_cause_sum_to_the_pool_after_every_one_of_10000_steps(
    kinds: tuple[LayerKind, ...], blocks: int, host_blocks: int, steps: int
) -> None:
    """Random requests with shared prefixes and aborts; every tenth time each cause is compared with
    a count made place by place. Prefixes that were evicted come back from the host's memory.
    """
    generator, tokens = random.Random(4), dict[str, list[int]]()
    pool = BlockPool(blocks, 4, kinds=kinds, token_bytes=3, host_blocks=host_blocks)
    scheduler = Scheduler(pool, 11, 6, 60, vocab_size=VOCAB)
    runner = MemoryRunner(VOCAB, kinds, 4, tokens.__getitem__)
    for step in range(steps):
        if generator.random() < 0.3 and scheduler.gauges().waiting < 4:
            add(scheduler, generator, tokens, f"r{step}")
        plan = scheduler.schedule()
        runner.transfer(scheduler.take_transfers())
        scheduler.commit(plan, runner.run(plan))
        if generator.random() < 0.02:
            scheduler.abort(generator.choice(sorted(tokens)))
        check_sums(scheduler)
        if step % 10 == 0:
            scheduler.check_integrity()
            check_accounting(scheduler)
    counts = scheduler.gauges().counts
    assert counts["preemptions"] > 0
    assert counts["prompt_tokens_cached"] > steps / 10
    assert counts["completions"] > steps / 50
    if host_blocks:
        assert min(runner.num_copied.values()) > steps / 50


def publish(pool: BlockPool, hashes: list[bytes]) -> None:
    """Leave a computed prefix behind in all kinds."""
    for index in range(len(pool.kinds)):
        blocks = pool.allocate(len(hashes), index)
        pool.publish(blocks, hashes, index)
        pool.release(blocks, index)


def test_a_hit_needs_the_end_of_the_prefix_in_every_window() -> None:
    """Window 8 at block 4: behind 6 spans the next token sees places 17 to 23, spans 4 and 5."""
    pool = BlockPool(60, 4, kinds=(FULL, LayerKind("window-8", 8, 2)))
    hashes = PrefixChain(pool.root("")).extend(range(24), 4)
    publish(pool, hashes)
    assert pool.match(hashes).num_spans == 6
    for missing, longest in ((5, 5), (4, 4), (3, 6), (0, 6)):
        head = pool._head_of_hash[1].pop(hashes[missing])
        hit = pool.match(hashes)
        assert hit.num_spans == longest
        assert len(hit.block_ids[0]) == longest
        assert len(hit.block_ids[1]) == 2 * min(2, longest)
        pool._head_of_hash[1][hashes[missing]] = head
    pool.check_integrity([[], []])


def test_a_long_prompt_holds_a_window_and_a_step_of_its_window_layers() -> None:
    kinds = (FULL, LayerKind("window-16", 16, 5))
    pool = BlockPool(400, 4, kinds=kinds, prefix_caching=False)
    scheduler = Scheduler(pool, 32, 4, 1000, vocab_size=VOCAB)
    prompt = [place % VOCAB for place in range(500)]
    assert scheduler.add(Request("long", prompt, SamplingParams(max_tokens=20), 0.0)) is None
    tokens = list(prompt)
    for _ in range(20):
        tokens.append((tokens[-1] * 31 + len(tokens) * 7 + 3) % VOCAB)
    runner = MemoryRunner(VOCAB, kinds, 4, lambda _: tokens)
    most = 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        most = max(most, pool.num_used_spans[1])
        scheduler.commit(plan, runner.run(plan))
        if scheduler.has_work and plan.num_sampled:
            assert pool.num_used_spans[1] <= 16 // 4 + 1
    assert most <= (16 + 32) // 4 + 1
    assert runner.num_checked > 1000


def test_windows_let_longer_requests_in_than_uniform_blocks_would() -> None:
    """The same bytes: 60 blocks of a sixth of the layers, or 10 of all layers."""
    kinds = (FULL, LayerKind("window-8", 8, 5))
    assert Demand(kinds, 4, 4).longest(60, 10_000) >= 3 * Demand((FULL,), 4, 4).longest(10, 10_000)


def test_a_pool_that_holds_not_one_token_of_all_kinds_is_refused() -> None:
    pool = BlockPool(5, 4, kinds=(FULL, LayerKind("window-8", 8, 5)))
    with pytest.raises(ConfigError, match="a single token takes 6 of them"):
        Scheduler(pool, 4, 4, 100, vocab_size=VOCAB)


def add(
    scheduler: Scheduler, generator: random.Random, tokens: dict[str, list[int]], name: str
) -> None:
    shared = list(range(generator.choice([0, 8, 17, 30])))
    prompt = shared + [generator.randrange(VOCAB) for _ in range(generator.randrange(1, 12))]
    count = generator.randrange(1, 18)
    tokens[name] = list(prompt)
    for _ in range(count):
        tokens[name].append((tokens[name][-1] * 31 + len(tokens[name]) * 7 + 3) % VOCAB)
    params = SamplingParams(max_tokens=count)
    assert scheduler.add(Request(name, prompt, params, 0.0)) is None
