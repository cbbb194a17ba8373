"""The unmodified openai package against a worker process."""

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hello, worker"}]


@pytest.fixture
def client(worker):
    with openai.OpenAI(base_url=worker.api + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **fields):
    base = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    return client.chat.completions.create(**(base | fields))


def test_chat_has_text_usage_and_end(client):
    reply = chat(client)
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 24
    assert reply.usage.prompt_tokens == len("<user>Hello, worker<assistant>")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 24


def test_stream_concatenates_to_the_whole_reply(client):
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.created for chunk in chunks}) == 1
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24


def test_stream_without_usage_has_none(client):
    chunks = list(chat(client, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_continuous_usage_grows_with_the_stream(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in chat(client, stream=True, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == 24


def test_second_equal_prompt_reports_cached_tokens(client):
    messages = [{"role": "user", "content": "the same long prompt, twice " * 4}]
    chat(client, messages=messages)
    reply = chat(client, messages=messages)
    assert reply.usage.prompt_tokens_details.cached_tokens >= 16


def test_text_parts_equal_the_string_form(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello, worker"}]}]
    assert chat(client, messages=parts).choices == chat(client).choices


def test_completion_prompt_forms_agree(client):
    def text(prompt):
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    ids = client.post("/../tokenize", body={"prompt": "abc"}, cast_to=object)["tokens"]
    assert text("abc") == text(["abc"]) == text(ids) == text([ids])
    assert text(["abc", "def"]) == text("abc") + text("def")


def test_completion_stream_of_two_prompts_names_each_index(client):
    fields = {"model": "tiny", "prompt": ["abc", "def"], "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**fields)
    texts, ends = ["", ""], {}
    for chunk in client.completions.create(**fields, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert texts == [choice.text for choice in whole.choices]
    assert ends == {0: "length", 1: "length"}


def test_completion_default_is_sixteen_tokens(client):
    reply = client.completions.create(model="tiny", prompt="abc")
    assert reply.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer_before_it(client, worker, stream):
    whole = client.completions.create(model="tiny", prompt="abc", max_tokens=48).choices[0].text
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    fields = {"model": "tiny", "prompt": "abc", "max_tokens": 48, "stop": [stop, "never seen"]}
    if stream:
        chunks = list(client.completions.create(**fields, stream=True))
        text, end = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(**fields).choices[0]
        text, end = choice.text, choice.finish_reason
    assert (text, end) == (expected, "stop")
    worker.wait_idle()


def fake_tokens(prompt_ids, count):
    """What the fake runner generates: its formula, stepped here by hand."""
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append((ids[-1] * 31 + len(ids) * 7 + 3) % 256)
    return ids[len(prompt_ids) :]


def test_stop_token_has_no_text_but_counts(client):
    prompt = [10, 20, 30]
    tokens = fake_tokens(prompt, 8)
    end = tokens.index(tokens[4])
    reply = client.completions.create(
        model="tiny", prompt=prompt, temperature=0, extra_body={"stop_token_ids": [tokens[4]]}
    )
    before = client.post("/../detokenize", body={"tokens": tokens[:end]}, cast_to=object)["prompt"]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].text == before
    assert reply.usage.completion_tokens == end + 1


def test_models_lists_the_one_model(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert model.max_model_len == 512
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_request_id_is_echoed_or_made(client):
    assert chat(client, extra_headers={"X-Request-Id": "abc-1"})._request_id == "abc-1"
    assert chat(client, extra_headers={"X-Request-Id": "bad id!"})._request_id.startswith("req-")
