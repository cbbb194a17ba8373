"""Sliding windows: the cpu backend agrees with the oracle, and a row's bits are its own."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilefleet_worker import attention
from tilefleet_worker.attention.base import AttentionBatch, AttentionRow, AttentionSpec
from tilefleet_worker.errors import ConfigError

BLOCK, BLOCKS = 16, 220
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32
CONTEXTS = (1, 40, 511, 513, 700, 1300)  # tokens stored of each request
BITS_PROMISED = torch.backends.cpu.get_cpu_capability() == "AVX2"


@pytest.fixture(scope="module", autouse=True)
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stored() -> torch.Tensor:
    """Keys and values of every request, in a cache whose unused slots hold other numbers."""
    torch.manual_seed(5)
    return torch.randn(2, BLOCKS + 1, BLOCK, KV_HEADS, HEAD_DIM)


def tables() -> list[tuple[int, ...]]:
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(2)).tolist()
    made = []
    for context in CONTEXTS:
        count = -(-context // BLOCK)
        made.append(tuple(order[:count]))
        order = order[count:]
    return made


def attend(
    backend: str,
    stored: torch.Tensor,
    spans: list[tuple[int, int, int]],
    spec: AttentionSpec,
) -> dict[tuple[int, int], torch.Tensor]:
    """Attend for (request, start, end) in one step; result by request and position.

    Queries, keys and values of a position are always the same: those of its slot in the cache.
    """
    config: Any = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, attention_soft_cap=0.0)
    cache = stored.clone()
    rows, slots, places = [], [], []
    for request, start, end in spans:
        table = tables()[request]
        rows.append(AttentionRow(len(slots), start, end, table))
        for position in range(start, end):
            slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
            places.append((request, position))
    index = torch.tensor(slots)
    flat = stored.flatten(1, 2)
    query = torch.randn(
        BLOCKS * BLOCK, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1)
    )[index]
    step = attention.create(backend, config).plan(AttentionBatch(tuple(rows), index))
    out = step.forward(query, flat[0][index], flat[1][index], cache, spec)
    return dict(zip(places, out, strict=True))


WINDOWS = (1, 24, 600)


@pytest.mark.parametrize("window", [0, *WINDOWS])
def test_a_window_agrees_with_the_oracle(stored: torch.Tensor, window: int) -> None:
    spec = AttentionSpec(scale=0.3, window=window)
    spans = [(index, max(0, end - 90), end) for index, end in enumerate(CONTEXTS)]
    fast = attend("cpu", stored, spans, spec)
    slow = attend("reference", stored, spans, spec)
    assert all(torch.isfinite(out).all() for out in fast.values())
    for place, out in slow.items():
        torch.testing.assert_close(fast[place], out, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_windowed_row_has_the_same_bits_alone_in_company_and_in_chunks(
    stored: torch.Tensor, window: int
) -> None:
    spec = AttentionSpec(scale=0.3, window=window)
    decodes = [(index, end - 1, end) for index, end in enumerate(CONTEXTS)]
    together = attend("cpu", stored, decodes, spec)
    chunks = attend("cpu", stored, [(i, max(0, e - 77), e) for i, e in enumerate(CONTEXTS)], spec)
    whole = attend("cpu", stored, [(5, 0, CONTEXTS[5])], spec)
    for index, end in enumerate(CONTEXTS):
        alone = attend("cpu", stored, [decodes[index]], spec)[index, end - 1]
        assert alone.equal(together[index, end - 1]) or not BITS_PROMISED
        assert alone.equal(chunks[index, end - 1]) or not BITS_PROMISED
    for position in range(CONTEXTS[5] - 77, CONTEXTS[5]):
        assert whole[5, position].equal(chunks[5, position]) or not BITS_PROMISED


def test_the_oracle_caps_scores(stored: torch.Tensor) -> None:
    """cap · tanh(score / cap), from its definition, for one query of one head."""
    spec = AttentionSpec(scale=2.0, soft_cap=1.5)
    made = attend("reference", stored, [(1, 39, 40)], spec)[1, 39]
    slots = [tables()[1][p // BLOCK] * BLOCK + p % BLOCK for p in range(40)]
    keys, values = stored.flatten(1, 2)[:, slots, 1].double()  # KV head 1 serves heads 3 … 5
    query = torch.randn(
        BLOCKS * BLOCK, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1)
    )[slots[-1], 4].double()
    scores = torch.tensor([1.5 * torch.tanh(2.0 * (query @ key) / 1.5) for key in keys])
    expected = scores.double().softmax(0) @ values
    torch.testing.assert_close(made[4].double(), expected, atol=1e-6, rtol=1e-5)


def test_the_cpu_backend_refuses_a_cap_instead_of_forgetting_it() -> None:
    config: Any = SimpleNamespace(num_heads=2, num_kv_heads=1, attention_soft_cap=30.0)
    with pytest.raises(ConfigError, match=r"scores are capped.*--backend reference"):
        attention.create("cpu", config)
    assert attention.create("reference", config).why_not() == []
