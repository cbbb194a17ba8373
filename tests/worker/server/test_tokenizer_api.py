"""Tokenizing by the server: texts, conversations, and what a client needs to do it itself."""

import httpx
import jinja2
import pytest

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Héllo"}]},
]
WRITTEN = "<system>Be brief.<user>Héllo<assistant>"


def post(worker, path, **body):
    return httpx.post(worker.api + path, json=body)


def test_a_text_goes_there_and_back(worker):
    reply = post(worker, "/tokenize", prompt="a é 日本", return_token_strs=True).json()
    assert set(reply) == {"count", "max_model_len", "tokens", "token_strs"}
    assert reply["count"] == len(reply["tokens"]) == len("a é 日本".encode())
    assert reply["max_model_len"] == 512
    assert reply["token_strs"][:2] == ["a", "Ġ"]
    back = post(worker, "/detokenize", tokens=reply["tokens"]).json()
    assert back == {"prompt": "a é 日本"}
    assert post(worker, "/tokenize", prompt="").json()["tokens"] == []


def test_a_conversation_is_tokenized_as_chat_does(worker):
    tokens = post(worker, "/tokenize", model="tiny", messages=MESSAGES).json()["tokens"]
    assert post(worker, "/detokenize", tokens=tokens).json()["prompt"] == WRITTEN
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    chat = post(worker, "/v1/chat/completions", **body).json()
    assert chat["usage"]["prompt_tokens"] == len(tokens)
    shorter = post(worker, "/tokenize", messages=MESSAGES, add_generation_prompt=False).json()
    assert shorter["tokens"] == tokens[: -len("<assistant>")]


def test_a_conversation_can_have_tools_and_options(real):
    tool = {"type": "function", "function": {"name": "weather", "description": "Of a city."}}
    asked = {"messages": MESSAGES, "tools": [tool]}
    asked["chat_template_kwargs"] = {"enable_thinking": True}
    tokens = post(real, "/tokenize", **asked).json()["tokens"]
    text = post(real, "/detokenize", tokens=tokens).json()["prompt"]
    assert '"name": "weather"' in text
    assert text.endswith("<assistant><think>")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"prompt": 1}, "prompt"),
    ],
)
def test_what_is_neither_is_refused(worker, body, param):
    reply = post(worker, "/tokenize", **body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_the_tokenizers_facts_are_enough_to_write_a_prompt(worker):
    facts = httpx.get(worker.api + "/tokenizer_info").json()
    assert facts["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (facts["eos_token"], facts["bos_token"], facts["pad_token"]) == ("<|end|>", None, None)
    assert facts["model_max_length"] == 512
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo"}]
    template = jinja2.Environment().from_string(facts["chat_template"])
    text = template.render(messages=messages, add_generation_prompt=True)
    assert text == WRITTEN
