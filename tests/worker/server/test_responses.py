"""/v1/responses with openai-python: text, schemas, tools, history, and every stream event."""

import json

import openai
import pytest

MODEL = "qwen3-tiny"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "light", "parameters": SCHEMA, "strict": True}


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=real.api + "/v1", api_key="k", max_retries=0) as client:
        yield client


def test_text_is_the_same_whole_and_streamed(client):
    fields = {"model": MODEL, "input": "hi", "max_output_tokens": 9, "temperature": 0}
    whole = client.responses.create(**fields, instructions="Be brief.")
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.usage.output_tokens == 9
    assert whole.output[0].content[0].type == "output_text"
    events = list(client.responses.create(**fields, instructions="Be brief.", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens


def test_a_schema_holds(client):
    found = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}},
        max_output_tokens=200,
        extra_body={"seed": 3},
    )
    # This model may begin to think by chance; what it says then still matches
    assert found.output_text == "" or json.loads(found.output_text)["ok"] in (True, False)


def test_calls_are_made_streamed_and_answered(client):
    fields = {
        "model": MODEL,
        "input": "hi",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "light"},
        "max_output_tokens": 200,
        "extra_body": {"seed": 5},
    }
    events = list(client.responses.create(**fields, stream=True))
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    made = events[-1].response.output[-1]
    if not done:  # the model began to think by chance and never ended
        pytest.fail(f"no call was made: {made}")
    assert json.loads(done[0].arguments)["ok"] in (True, False)
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == done[0].arguments == made.arguments
    history = [
        {"role": "user", "content": "hi"},
        made.model_dump(),
        {"type": "function_call_output", "call_id": made.call_id, "output": "on"},
    ]
    after = client.responses.create(model=MODEL, input=history, tools=[TOOL], max_output_tokens=3)
    assert after.usage.output_tokens <= 3


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].name"),
        ({"input": [{"type": "image"}]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"tools": [TOOL] * 129}, "tools"),
    ],
)
def test_what_is_not_served_is_named(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body={"model": MODEL, "input": "hi"} | change, cast_to=object)
    assert caught.value.param == param
