"""The sampler: distributions, limits, and independence of a row from all others."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tilefleet_worker.choice import NoTokenError, choose, draw
from tilefleet_worker.history import TokenHistory
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.sampler import sample
from tilefleet_worker.step import StepRow


def row(name: str, seed: int = 0, end: int = 5, **params: object) -> StepRow:
    extra = {key: params.pop(key) for key in ("history", "constraint") if key in params}
    banned = params.pop("banned", ())
    made = SamplingParams(max_tokens=1, **params)  # type: ignore[arg-type]
    return StepRow(
        name,
        end - 1,
        (0,),
        (0,),
        True,
        made,
        seed,
        banned,
        **extra,  # type: ignore[arg-type]
    )


def said(prompt: list[int], generated: list[int]) -> TokenHistory:
    history = TokenHistory(prompt)
    for token in generated:
        history.append(token)
    return history


def draws(logits: list[float], count: int, **params: object) -> list[int]:
    made = SamplingParams(max_tokens=1, **params)  # type: ignore[arg-type]
    return [draw(np.array(logits), made, 7, position) for position in range(count)]


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
@example(logits=[-1.7983970027620804e-22, 0.0], top_k=1, top_p=1.0, temperature=1.0, seed=0)
def test_the_choice_is_always_inside_top_k_and_top_p(
    logits: list[float], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    chosen = draw(np.array(logits), params, seed, 3)
    # Logits may differ by so little that their weights are equal: then the id decides.
    weight = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-weight[token], token))
    order = order[: top_k or len(logits)]
    weights = [weight[token] for token in order]
    before = sum(weights[: order.index(chosen)]) / sum(weights)
    assert before < top_p + 1e-9


def test_a_flat_vocabulary_larger_than_the_first_look_is_covered() -> None:
    """More candidates than the first look, so that the whole vocabulary must be sorted."""
    drawn = {
        draw(np.zeros(5000), SamplingParams(max_tokens=1, top_p=0.9), 1, position)
        for position in range(400)
    }
    assert max(drawn) > 4000
    assert max(drawn) < 4501


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 300, generator=generator)
    kinds: list[dict[str, object]] = [
        {},
        {"top_k": 5},
        {"top_p": 0.5},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"banned": (3, 4)},
        {"min_p": 0.2, "logprobs": 3},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "history": said([1, 2], [5, 5, 9])},
        {"temperature": 0.0, "logit_bias": ((7, 9.5),), "logprobs": 0},
    ]
    rows = [row(str(index), seed=index, **kind) for index, kind in enumerate(kinds)]
    together = sample(logits.clone(), rows)
    assert not together.faults
    for index, one in enumerate(rows):
        alone = sample(logits[index : index + 1].clone(), [one])
        assert alone.tokens == {one.request_id: together.tokens[one.request_id]}
        assert alone.logprobs.get(one.request_id) == together.logprobs.get(one.request_id)


def test_seed_and_position_decide_the_draw() -> None:
    params = SamplingParams(max_tokens=1)
    drawn = [
        [draw(np.zeros(1000), params, seed, position) for position in range(20)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len(set(drawn[0])) > 15


def test_banned_tokens_are_never_chosen_and_strange_ids_are_ignored() -> None:
    logits = [5.0, 1.0, 0.0]
    rows = [row("a", end=end, banned=(0, 99, -1)) for end in range(1, 200)]
    assert {choose(np.array(logits), one) for one in rows} == {1, 2}
    result = sample(torch.tensor([logits]), [row("a", temperature=0.0, banned=(0,))])
    assert result.tokens == {"a": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_fault_their_row_only(bad: float) -> None:
    logits = torch.tensor([[0.0, bad], [0.0, 1.0]])
    result = sample(logits, [row("a"), row("b", temperature=0.0)])
    assert result.tokens == {"b": 1}
    assert "not finite at position 5" in result.faults["a"]


def greedy(logits: list[float], **params: object) -> int:
    return choose(np.array(logits), row("a", temperature=0.0, **params))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, 0),
        ({"repetition_penalty": 2.0}, 2),  # 4 and 3.9 were seen: 2, 1.95; 2.2 was not
        ({"repetition_penalty": 1.5}, 0),
        ({"presence_penalty": 0.2}, 1),  # generated once: 4 - 0.2 < 3.9
        ({"frequency_penalty": 0.05}, 0),
        ({"frequency_penalty": 0.05, "generated": [0, 0, 0]}, 1),
        ({"presence_penalty": 0.05, "generated": [0, 0, 0]}, 0),
        ({"logit_bias": ((2, 1.9),)}, 2),
        ({"logit_bias": ((0, -100.0), (1, -100.0))}, 2),
        ({"bad_words": ((0,),)}, 1),
        ({"bad_words": ((0, 0),)}, 1),  # the answer ends with 0: another one is banned
        ({"bad_words": ((1, 0),)}, 0),
        ({"allowed_token_ids": (2, 3)}, 2),
    ],
)
def test_what_reshapes_the_greedy_choice(params: dict[str, object], expected: int) -> None:
    history = said([1], params.pop("generated", [0]))  # type: ignore[arg-type]
    chosen = greedy([4.0, 3.9, 2.2, -1.0], history=history, **params)
    assert chosen == expected


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=40),
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    generated=st.lists(st.integers(0, 3), max_size=6),
    repetition=st.floats(0.2, 3.0),
    frequency=st.floats(-2.0, 2.0),
    presence=st.floats(-2.0, 2.0),
)
def test_penalties_are_what_their_formulas_say(
    logits: list[float],
    prompt: list[int],
    generated: list[int],
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    expected = list(logits)
    for token in range(len(logits)):
        if token in prompt or token in generated:
            value = expected[token]
            expected[token] = value / repetition if value > 0 else value * repetition
        expected[token] -= frequency * generated.count(token)
        expected[token] -= presence * (token in generated)
    values = np.array(logits)
    params = {
        "repetition_penalty": repetition,
        "frequency_penalty": frequency,
        "presence_penalty": presence,
    }
    chosen = choose(values, row("a", temperature=0.0, history=said(prompt, generated), **params))
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
    assert expected[chosen] >= max(expected) - 1e-9


def test_min_p_drops_what_is_less_likely_than_its_share_of_the_best() -> None:
    logits = [math.log(p) for p in (0.6, 0.31, 0.05, 0.04)]
    assert set(draws(logits, 600, min_p=0.5)) == {0, 1}
    assert set(draws(logits, 600, min_p=1.0)) == {0}
    assert set(draws(logits, 900)) == {0, 1, 2, 3}
    assert set(draws(logits, 600, min_p=0.07, top_k=2)) == {0, 1}


class Only:
    """A grammar that allows these tokens; none at all is broken."""

    def __init__(self, *allowed: int) -> None:
        self.allowed_ids = allowed

    def allowed(self) -> np.ndarray:
        if not self.allowed_ids:
            raise ValueError("the grammar is broken")
        mask = np.zeros(4, dtype=bool)
        mask[list(self.allowed_ids)] = True
        return mask

    def accept(self, token_id: int) -> None:
        """Nothing to remember."""


def test_a_grammar_masks_its_row_and_a_broken_one_faults_it_alone() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4)
    rows = [
        row("masked", temperature=0.0, constraint=Only(2, 3)),
        row("broken", temperature=0.0, constraint=Only()),
        row("nothing left", temperature=0.0, constraint=Only(1), banned=(1,)),
        row("mate", temperature=0.0),
    ]
    result = sample(logits, rows)
    assert result.tokens == {"masked": 2, "mate": 0}
    assert set(result.faults) == {"broken", "nothing left"}
    with pytest.raises(NoTokenError):
        choose(np.zeros(4), rows[2])


def test_logprobs_are_the_log_softmax_of_the_raw_logits() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    expected = torch.log_softmax(logits.double(), dim=-1)
    rows = [
        row("a", temperature=0.0, logprobs=5, logit_bias=((7, 100.0),)),
        row("b", temperature=0.7, logprobs=0),
    ]
    result = sample(logits.clone(), rows)
    assert result.tokens["a"] == 7
    for index, name in enumerate("ab"):
        found = result.logprobs[name]
        assert found.token_id == result.tokens[name]
        assert found.logprob == pytest.approx(float(expected[index, found.token_id]), abs=1e-12)
        assert found.rank == int((logits[index] > logits[index, found.token_id]).sum()) + 1
    best = torch.topk(expected[0], 5)
    assert [token for token, _ in result.logprobs["a"].top] == best.indices.tolist()
    assert [p for _, p in result.logprobs["a"].top] == pytest.approx(best.values.tolist())
    assert result.logprobs["b"].top == ()


def test_targets_of_a_prompt_are_scored_beside_the_next_token() -> None:
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(4))
    scored = StepRow(
        "scored", 0, (1, 2, 3), (0,), True,
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2), 0, targets=(2, 3),
    )  # fmt: skip
    result = sample(logits.clone(), [row("first", temperature=0.0), scored,
                                     row("last", temperature=0.0)])  # fmt: skip
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert result.tokens == {
        "first": int(logits[0].argmax()),
        "scored": int(logits[3].argmax()),
        "last": int(logits[4].argmax()),
    }
    scores = result.prompt_logprobs["scored"]
    assert [s.token_id for s in scores] == [2, 3]
    for place, found in zip((1, 2), scores, strict=True):
        assert found.logprob == pytest.approx(float(expected[place, found.token_id]), abs=1e-12)
        assert found.top[0][0] == int(logits[place].argmax())
