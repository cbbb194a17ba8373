"""Grammars: what they allow is what their schema, pattern or rules say, and bombs end in a 400."""

import asyncio
import contextlib
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilefleet_worker.errors import RequestError
from tilefleet_worker.grammar import COMPILE_SECONDS, AfterReasoning, Constraint, Grammar, Grammars
from tilefleet_worker.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "examples" / "tiny-model" / "model"
TOKENIZER = Tokenizer.load(MODEL)
END = TOKENIZER.eos_token_id or 0
SIZE = TOKENIZER.vocab_size + 13  # logits are often padded
GRAMMARS = Grammars(TOKENIZER.to_json(), SIZE, [END])


def walk(constraint: Constraint | AfterReasoning, seed: int, limit: int = 400) -> str:
    """Text of a random walk over allowed tokens, to its end."""
    random = np.random.default_rng(seed)
    tokens: list[int] = []
    for _ in range(limit):
        mask = constraint.allowed()
        assert mask.shape == (SIZE,)
        token = int(random.choice(np.flatnonzero(mask)))
        constraint.accept(token)
        if token == END:
            return TOKENIZER.decode(tokens)
        tokens.append(token)
    return TOKENIZER.decode(tokens)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_every_walk_through_a_schema_is_an_instance_of_it(seed: int) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA), "guided_json", compact=True)
    value = json.loads(walk(GRAMMARS.compile(grammar), seed))
    assert set(value) == {"name", "age", "kind", "tags"}
    assert len(value["name"]) <= 5
    assert 0 <= value["age"] <= 99
    assert value["kind"] in ("a", "b", None)
    assert all(type(tag) is bool for tag in value["tags"])


def test_white_space_cannot_go_on_for_ever() -> None:
    constraint = GRAMMARS.compile(Grammar("json_schema", '{"type": "boolean"}', "x"))
    spaces = [token for token in range(SIZE) if TOKENIZER.spelling(token) == b" "]
    for _ in range(200):
        mask = constraint.allowed()
        if not mask[spaces[0]]:
            return
        constraint.accept(spaces[0])
    raise AssertionError("200 spaces were allowed")


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", "[a-c]{2,4}-[0-9]+x", "guided_regex"), r"[a-c]{2,4}-[0-9]+x"),
        (Grammar.choice(['yes "sir"', "no\n", "é"], "guided_choice"), 'yes "sir"|no\n|é'),
        (Grammar("lark", 'start: "a" B\nB: /[0-9]{3}/', "guided_grammar"), "a[0-9]{3}"),
        (Grammar("lark", 'root ::= "a" | "b" c\nc ::= [0-9] [0-9]', "g"), "a|b[0-9][0-9]"),
    ],
)
def test_walks_match_their_pattern(grammar: Grammar, pattern: str) -> None:
    for seed in range(8):
        found = walk(GRAMMARS.compile(grammar), seed)
        # A number may go on to the limit of the walk: then it is a beginning of a match
        assert re.fullmatch(pattern, found) or grammar.text.endswith("+x")


def test_a_constraint_refuses_what_it_does_not_allow_and_stays_refused() -> None:
    constraint = GRAMMARS.compile(Grammar("regex", "[ab]+", "x"))
    [letter] = TOKENIZER.encode("z", add_special_tokens=False)
    with pytest.raises(ValueError, match="grammar failed"):
        constraint.accept(letter)
    with pytest.raises(ValueError, match="grammar failed"):
        constraint.allowed()


def test_after_its_end_only_the_end_is_allowed() -> None:
    constraint = GRAMMARS.compile(Grammar.choice(["a"], "x"))
    constraint.accept(TOKENIZER.encode("a", add_special_tokens=False)[0])
    for _ in range(3):
        assert np.flatnonzero(constraint.allowed()).tolist() == [END]
        constraint.accept(END)


def test_answers_of_one_grammar_do_not_share_their_state() -> None:
    grammar = Grammar.choice(["ab"], "x")
    first, second = GRAMMARS.compile(grammar), GRAMMARS.compile(grammar)
    first.accept(int(np.flatnonzero(first.allowed())[0]))
    assert not np.array_equal(first.allowed(), second.allowed())
    assert np.array_equal(second.copy().allowed(), second.allowed())


def test_reasoning_is_free_and_the_answer_is_not() -> None:
    begin, end, other = 5, 6, 7
    inner = GRAMMARS.compile(Grammar.choice(["a"], "x"))
    letter = int(np.flatnonzero(inner.allowed())[0])
    thinking = AfterReasoning(inner.copy(), begin, end, inside=False)
    assert set(np.flatnonzero(thinking.allowed())) == {begin, letter}
    thinking.accept(begin)
    assert thinking.allowed().all()
    thinking.accept(other)
    thinking.accept(end)
    assert np.array_equal(thinking.allowed(), inner.allowed())
    at_once = AfterReasoning(inner.copy(), begin, end, inside=False).copy()
    at_once.accept(letter)
    assert np.flatnonzero(at_once.allowed()).tolist() == [END]
    assert AfterReasoning(inner, begin, end, inside=True).copy().allowed().all()


BOMBS = [
    Grammar("regex", "(" * 30_000 + ")" * 30_000, "guided_regex"),
    Grammar("regex", "((((" * 9, "guided_regex"),
    Grammar("regex", "(?=x)y", "guided_regex"),
    Grammar("lark", "start: nothing", "guided_grammar"),
    Grammar("lark", "root ::= (", "guided_grammar"),
    Grammar("lark", "start: start\n" * 5000, "guided_grammar"),
    Grammar("json_schema", '{"$ref": "http://example.com/x"}', "guided_json"),
    Grammar("json_schema", '{"enum": []}', "guided_json"),
    Grammar("json_schema", '{"type": "nonsense"}', "guided_json"),
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.text[:16])
def test_what_cannot_be_compiled_is_the_callers_error(bomb: Grammar) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError) as caught:
        asyncio.run(GRAMMARS.constraint(bomb))
    assert (caught.value.status, caught.value.param) == (400, bomb.param)
    assert len(caught.value.message) < 400
    assert time.monotonic() - began < 30 + COMPILE_SECONDS


@pytest.mark.parametrize(
    "text",
    [
        "(a|b)*a(a|b){2000}",
        "(x{1000}){1000}{1000}",
        ".*" * 200 + "x{1000}{100}",
        "(.*x){400}",
        "(a{1,50}){1,50}b",
    ],
)
def test_a_grammar_that_explodes_later_ends_in_an_error_and_not_in_a_crash(text: str) -> None:
    with contextlib.suppress(RequestError, ValueError):
        walk(GRAMMARS.compile(Grammar("regex", text, "guided_regex")), 1, limit=60)
    assert walk(GRAMMARS.compile(Grammar.choice(["fine"], "x")), 1) == "fine"


def test_a_model_without_an_end_cannot_have_grammars() -> None:
    with pytest.raises(RequestError, match="no end-of-sequence"):
        Grammars(TOKENIZER.to_json(), SIZE, []).compile(Grammar("regex", "a", "x"))
