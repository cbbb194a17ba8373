"""Tool calls and reasoning in the text of an answer: the same parts however the text is cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilefleet_worker.output_parser import (
    CallArguments,
    CallBegins,
    Chain,
    OutputParser,
    Part,
    Said,
    Thought,
)
from tilefleet_worker.reasoning import ThinkParser, begins_inside
from tilefleet_worker.tool_calls import NamedCall, ToolCallParser, family_of, family_parser


def read(parser: OutputParser, *pieces: str) -> list[Part]:
    """All parts, neighbours of one kind joined."""
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Said) and isinstance(last, Said):
            joined[-1] = Said(last.text + part.text)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            joined[-1] = Thought(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments):
            assert part.index == last.index
            joined[-1] = CallArguments(part.index, last.text + part.text)
        else:
            joined.append(part)
    return joined


def call(index: int, name: str, arguments: str) -> list[Part]:
    return [CallBegins(index, name), CallArguments(index, arguments)]


HERMES = 'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{"}}\n</tool_call>\n'


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("hermes", "just text < 3", [Said("just text < 3")]),
        ("hermes", HERMES, [Said("Sure."), *call(0, "f", '{"a": "}\\"{"}'), Said("\n")]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
            '<tool_call>{"arguments": {"x": [1]}, "name": "g"}</tool_call>',
            [*call(0, "f", "{}"), *call(1, "g", '{"x": [1]}')],
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
            call(0, "f", '{"x": 1}'),
        ),
        ("hermes", "<tool_call>nonsense</tool_call>!", [Said("<tool_call>nonsense</tool_call>!")]),
        ("hermes", '<tool_call>{"no": "call"}</tool_call>', [Said('{"no": "call"}')]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"cut',
            [CallBegins(0, "f"), CallArguments(0, '{"cut')],
        ),
        ("hermes", '<tool_call>{"nam', [Said('{"nam')]),
        ("hermes", "<tool_c", [Said("<tool_c")]),
        (
            "llama3_json",
            '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}',
            [*call(0, "f", '{"x": 1}'), *call(1, "g", "{}")],
        ),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}', call(0, "f", "{}")),
        ("llama3_json", 'Look: {"name": "f"}', [Said('Look: {"name": "f"}')]),
        ("llama3_json", '{"answer": 42}', [Said('{"answer": 42}')]),
        (
            "mistral",
            'Hm [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
            [Said("Hm "), *call(0, "f", '{"x": 1}'), *call(1, "g", "{}")],
        ),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}', call(0, "f", '{"x": 1}')),
        (
            "mistral",
            '[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"x": {}}[TOOL_CALLS]g{"y": 2}',
            [*call(0, "f", '{"x": {}}'), *call(1, "g", '{"y": 2}')],
        ),
    ],
)
def test_calls_of_each_family(family: str, text: str, expected: list[Part]) -> None:
    assert read(family_parser(family), text) == expected
    assert read(family_parser(family), *text) == expected


@given(
    st.sampled_from(["hermes", "llama3_json", "mistral"]),
    st.lists(
        st.sampled_from([
            "<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "f", "arguments": {"a": "}"}}',
            '{"arguments": [', "{", "}", "]", '"', "\\", "\n", " ",
            "text", "<think>", "<|python_tag|>",
        ]),
        max_size=12,
    ),
    st.lists(st.integers(1, 200), max_size=8),
)  # fmt: skip
def test_parts_do_not_depend_on_the_cuts(family: str, words: list[str], cuts: list[int]) -> None:
    text = "".join(words)
    points = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(points)]
    whole = read(family_parser(family), text)
    assert read(family_parser(family), *pieces) == whole
    assert read(family_parser(family), *text) == whole


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=4), st.text(max_size=9))
def test_arguments_come_out_as_they_went_in(arguments: dict[str, str], before: str) -> None:
    body = json.dumps({"name": "f", "arguments": arguments})
    before = before.replace("<", "")
    found = read(family_parser("hermes"), *f"{before}\n<tool_call>\n{body}\n</tool_call>")
    text = "".join(part.text for part in found if isinstance(part, CallArguments))
    assert json.loads(text) == arguments


def test_arguments_stream_while_they_are_written() -> None:
    parser = family_parser("hermes")
    assert parser.push('<tool_call>{"name": "f", "arguments": {"a"') == [
        CallBegins(0, "f"),
        CallArguments(0, '{"a"'),
    ]
    assert parser.push(": 1") == [CallArguments(0, ": 1")]


def test_forced_calls_need_no_markers() -> None:
    text = '[{"name": "f", "parameters": {"x": 1}}, {"name": "g", "parameters": {}}]'
    expected = [*call(0, "f", '{"x": 1}'), *call(1, "g", "{}")]
    assert read(ToolCallParser(""), text) == read(ToolCallParser(""), *text) == expected
    assert read(NamedCall("f"), '{"x"', ": 1}") == call(0, "f", '{"x": 1}')


@pytest.mark.parametrize(
    ("inside", "text", "expected"),
    [
        (False, "<think>why\n</think>\n\nso", [Thought("why\n"), Said("so")]),
        (False, "\n<think>why</think>so </think>", [Thought("why"), Said("so </think>")]),
        (False, "plain <think>", [Said("plain <think>")]),
        (False, "<thi", [Said("<thi")]),
        (False, "<think>never ends", [Thought("never ends")]),
        (False, "<think></think>", []),
        (True, "why</think>so", [Thought("why"), Said("so")]),
        (True, "why</thi", [Thought("why</thi")]),
        (True, "</think>\n\n", []),
    ],
)
def test_reasoning_is_split_off(inside: bool, text: str, expected: list[Part]) -> None:
    assert read(ThinkParser(inside=inside), text) == expected
    assert read(ThinkParser(inside=inside), *text) == expected


def test_calls_follow_reasoning() -> None:
    text = f"<think>I <tool_call> it</think>\n{HERMES}"
    chain = [Chain(ThinkParser(inside=False), family_parser("hermes")) for _ in range(2)]
    assert read(chain[0], text) == read(chain[1], *text)
    assert read(Chain(ThinkParser(inside=False), family_parser("hermes")), text) == [
        Thought("I <tool_call> it"), Said("Sure."), *call(0, "f", '{"a": "}\\"{"}'), Said("\n"),
    ]  # fmt: skip


def test_prompts_tell_where_an_answer_begins() -> None:
    assert begins_inside("<assistant><think>\n")
    assert not begins_inside("<assistant><think>\n\n</think>\n\n")
    assert not begins_inside("<assistant>")


def test_families_are_known_by_their_templates() -> None:
    assert family_of("... <tool_call> ...") == "hermes"
    assert family_of("... [TOOL_CALLS] ...") == "mistral"
    assert family_of("... <|python_tag|> ...") == "llama3_json"
    assert family_of("{{ messages }}") is None
