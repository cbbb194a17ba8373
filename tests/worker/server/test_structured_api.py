"""Structured output, tool calls and reasoning over HTTP, on the real tiny model."""

import json
import re

import httpx
import openai
import pytest

CHAT = {
    "model": "qwen3-tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 400,
    "temperature": 1.0,
    "seed": 4,
    "logit_bias": {"258": -100},  # <think>: this model would begin to reason by chance
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "old": {"type": "boolean"},
        "kind": {"enum": ["a", None]},
    },
    "required": ["name", "old", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": None,
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}},
                "required": ["on"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
    for name in ("light", "heat")
]


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=real.api + "/v1", api_key="k", max_retries=0) as client:
        yield client


def ask(real, **change):
    reply = httpx.post(real.api + "/v1/chat/completions", json=CHAT | change, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
    ],
)
def test_a_schema_holds_in_a_sampled_answer(real, fields):
    choice = ask(real, **fields)
    value = json.loads(choice["message"]["content"])
    assert set(value) == {"name", "old", "kind"}
    assert value["kind"] in ("a", None)
    assert choice["finish_reason"] == "stop"


def test_patterns_choices_and_grammars_hold(real):
    assert re.fullmatch(
        "[ab]{3}-[0-9]{2}", ask(real, guided_regex="[ab]{3}-[0-9]{2}")["message"]["content"]
    )
    assert ask(real, guided_choice=["yes", "no"])["message"]["content"] in ("yes", "no")
    assert ask(real, structured_outputs={"choice": ["ü"]})["message"]["content"] == "ü"
    grammar = 'root ::= "x" | "y" [0-9]'
    assert re.fullmatch("x|y[0-9]", ask(real, guided_grammar=grammar)["message"]["content"])
    start = ask(real, response_format={"type": "json_object"})["message"]["content"].lstrip()
    assert start.startswith("{")


def test_text_completions_are_constrained_too_and_siblings_have_states_of_their_own(real):
    body = {"model": "qwen3-tiny", "prompt": "x", "n": 4, "max_tokens": 30, "seed": 1,
            "guided_regex": "[ab]{5}"}  # fmt: skip
    choices = httpx.post(real.api + "/v1/completions", json=body, timeout=60).json()["choices"]
    assert all(re.fullmatch("[ab]{5}", choice["text"]) for choice in choices)
    assert len({choice["text"] for choice in choices}) > 1


def test_a_bad_grammar_is_this_callers_400_alone(real):
    bad = CHAT | {"guided_regex": "((("}
    reply = httpx.post(real.api + "/v1/chat/completions", json=bad)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "guided_regex")
    assert ask(real, guided_choice=["ok"])["message"]["content"] == "ok"


def test_a_required_call_is_one_of_the_tools(real, client):
    found = client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice="required")
    choice = found.choices[0]
    assert choice.finish_reason in ("tool_calls", "length")
    first = choice.message.tool_calls[0]
    assert first.function.name in ("light", "heat")
    assert json.loads(first.function.arguments)["on"] in (True, False)
    one = client.chat.completions.create(
        **CHAT, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    assert one.choices[0].finish_reason == "tool_calls"
    assert len(one.choices[0].message.tool_calls) == 1


def test_a_named_call_is_made_and_streams_like_it_answers(client):
    fields = CHAT | {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "heat"}},
    }
    whole = client.chat.completions.create(**fields).choices[0]
    [made] = whole.message.tool_calls
    assert made.function.name == "heat"
    assert whole.message.content is None
    with client.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.arguments == made.function.arguments
    assert final.message.tool_calls[0].id.startswith("call_")
    assert final.finish_reason == whole.finish_reason


def test_a_call_in_the_models_own_words_is_found_whole_and_streamed(client):
    call = r'<tool_call>\n\{"name": "light", "arguments": \{"on": (true|false)\}\}\n</tool_call>'
    fields = CHAT | {"tools": TOOLS, "extra_body": {"guided_regex": call}}
    whole = client.chat.completions.create(**fields).choices[0]
    [made] = whole.message.tool_calls
    assert (made.function.name, whole.finish_reason) == ("light", "tool_calls")
    assert json.loads(made.function.arguments)["on"] in (True, False)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert deltas[0].function.name == "light"
    assert len(deltas) > 3
    text = "".join(delta.function.arguments or "" for delta in deltas)
    assert text == made.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    ignored = client.chat.completions.create(**fields, tool_choice="none").choices[0]
    assert ignored.message.tool_calls is None
    assert ignored.message.content.startswith("<tool_call>")


def test_results_of_calls_go_back_to_the_model(client):
    history = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function",
                 "function": {"name": "light", "arguments": '{"on": true}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]  # fmt: skip
    found = client.chat.completions.create(**(CHAT | {"messages": history, "tools": TOOLS}))
    assert found.usage.prompt_tokens > 200


def test_reasoning_is_split_off_and_the_answer_keeps_its_schema(client):
    """Token 259 is </think>: a bias makes the model end its reasoning soon."""
    fields = CHAT | {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "extra_body": {
            "chat_template_kwargs": {"enable_thinking": True},
            "logit_bias": {"258": -100, "259": 2},
        },
    }
    message = client.chat.completions.create(**fields).choices[0].message
    assert set(json.loads(message.content)) == {"name", "old", "kind"}
    assert isinstance(message.reasoning_content, str)
    chunks = [c.choices[0].delta for c in client.chat.completions.create(**fields, stream=True)]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in chunks)
    assert thought == message.reasoning_content
    assert "".join(delta.content or "" for delta in chunks) == message.content
    hidden = client.chat.completions.create(
        **(fields | {"extra_body": fields["extra_body"] | {"include_reasoning": False}})
    ).choices[0].message  # fmt: skip
    assert not hasattr(hidden, "reasoning_content")
    assert hidden.content == message.content


def test_a_grammar_that_cannot_go_on_ends_its_request_and_no_other(real):
    """min_tokens bans the end where the grammar allows nothing else."""
    mate = {"model": "qwen3-tiny", "prompt": "mate", "max_tokens": 60, "temperature": 0}
    alone = httpx.post(real.api + "/v1/completions", json=mate, timeout=60).json()
    with httpx.stream(
        "POST", real.api + "/v1/completions", json=mate | {"stream": True}, timeout=60
    ) as running:
        lines = running.iter_lines()
        first = next(lines)
        broken = httpx.post(
            real.api + "/v1/chat/completions",
            json=CHAT | {"guided_choice": ["ab"], "min_tokens": 50},
            timeout=60,
        )
        rest = [first, *lines]
    assert broken.status_code == 500
    assert broken.json()["error"]["code"] == "internal_error"
    events = [json.loads(line[6:]) for line in rest if line and line != "data: [DONE]"]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == alone["choices"][0]["text"]
