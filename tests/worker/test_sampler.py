"""The sampler: distributions, limits, and independence of a row from all others."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilefleet_worker.request import SamplingParams
from tilefleet_worker.sampler import choose, sample
from tilefleet_worker.step import StepRow


def row(name: str, seed: int = 0, end: int = 5, **params: object) -> StepRow:
    banned = params.pop("banned", ())
    made = SamplingParams(max_tokens=1, **params)  # type: ignore[arg-type]
    return StepRow(name, end - 1, (0,), (0,), True, made, seed, banned)  # type: ignore[arg-type]


def draws(logits: list[float], count: int, **params: object) -> list[int]:
    made = SamplingParams(max_tokens=1, **params)  # type: ignore[arg-type]
    return [choose(np.array(logits), made, 7, position) for position in range(count)]


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    result = sample(logits, [row("a", temperature=0.0), row("b", temperature=0.0)])
    assert result.tokens == {"a": 1, "b": 0}


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.999999}])
def test_frequencies_follow_the_probabilities(params: dict[str, object]) -> None:
    probabilities = [0.5, 0.3, 0.2]
    drawn = draws([math.log(p) for p in probabilities], 6000, **params)
    for token, probability in enumerate(probabilities):
        # 5 standard deviations: fails by chance once in a million, and the seeds are fixed
        spread = 5 * math.sqrt(probability * (1 - probability) / 6000)
        assert abs(drawn.count(token) / 6000 - probability) < spread


def test_temperature_sharpens_and_flattens() -> None:
    cold = draws([0.0, 1.0], 2000, temperature=0.25).count(1) / 2000
    warm = draws([0.0, 1.0], 2000, temperature=4.0).count(1) / 2000
    assert abs(cold - 1 / (1 + math.exp(-4))) < 0.03
    assert abs(warm - 1 / (1 + math.exp(-0.25))) < 0.05


@pytest.mark.parametrize("temperature", [1e-30, 1e-9, 100.0])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        drawn = draws([-1e4, 1e4, 0.0], 20, temperature=temperature)
    assert set(drawn) == {1}


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=60),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.05, 5.0),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_choice_is_always_inside_top_k_and_top_p(
    logits: list[float], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    chosen = choose(np.array(logits), params, seed, 3)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: top_k or len(logits)]
    weights = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in order]
    before = sum(weights[: order.index(chosen)]) / sum(weights)
    assert before < top_p + 1e-9


def test_a_flat_vocabulary_larger_than_the_first_look_is_covered() -> None:
    """More candidates than the first look, so that the whole vocabulary must be sorted."""
    drawn = {
        choose(np.zeros(5000), SamplingParams(max_tokens=1, top_p=0.9), 1, position)
        for position in range(400)
    }
    assert max(drawn) > 4000
    assert max(drawn) < 4501


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 300, generator=generator)
    kinds: list[dict[str, object]] = [
        {},
        {"top_k": 5},
        {"top_p": 0.5},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"banned": (3, 4)},
    ]
    rows = [row(str(index), seed=index, **kind) for index, kind in enumerate(kinds)]
    together = sample(logits.clone(), rows).tokens
    for index, one in enumerate(rows):
        assert sample(logits[index : index + 1].clone(), [one]).tokens == {
            one.request_id: together[one.request_id]
        }


def test_seed_and_position_decide_the_draw() -> None:
    params = SamplingParams(max_tokens=1)
    drawn = [
        [choose(np.zeros(1000), params, seed, position) for position in range(20)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len(set(drawn[0])) > 15


def test_banned_tokens_are_never_chosen_and_strange_ids_are_ignored() -> None:
    logits = [5.0, 1.0, 0.0]
    params = SamplingParams(max_tokens=1)
    assert {choose(np.array(logits), params, 1, p, (0, 99, -1)) for p in range(200)} == {1, 2}
    result = sample(torch.tensor([logits]), [row("a", temperature=0.0, banned=(0,))])
    assert result.tokens == {"a": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_fault_their_row_only(bad: float) -> None:
    logits = torch.tensor([[0.0, bad], [0.0, 1.0]])
    result = sample(logits, [row("a"), row("b", temperature=0.0)])
    assert result.tokens == {"b": 1}
    assert "not finite at position 5" in result.faults["a"]
