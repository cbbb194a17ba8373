"""Whatever a client sends wrong: one clear error, and the worker goes on."""

import json
import socket

import httpx
import openai
import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "f"}}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 4}


def post(worker, path, body, **options):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(worker.api + path, content=data, **options)


def error_of(reply):
    body = reply.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0].function"),
        ({"tools": [TOOL]}, "unsupported_parameter", "tools"),  # this template has no calls
        ({"tools": [TOOL], "tool_choice": "some"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "invalid_value",
            "tool_choice",
        ),
        ({"guided_regex": "((("}, "invalid_value", "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "invalid_value", "guided_grammar"),
        ({"guided_grammar": "root ::= ("}, "invalid_value", "guided_grammar"),
        ({"guided_json": "no json"}, "invalid_value", "guided_json"),
        ({"guided_json": {"type": "nonsense"}}, "invalid_value", "guided_json"),
        ({"guided_json": "[" * 1000}, "invalid_value", "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "invalid_value", "guided_choice"),
        (
            {"structured_outputs": {"regex": "a" * 70_000}},
            "invalid_value",
            "structured_outputs.regex",
        ),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "unsupported_parameter",
            "structured_outputs.structural_tag",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "invalid_value",
            "response_format.json_schema",
        ),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 129}, "invalid_value", "n"),
        ({"logprobs": 3}, "invalid_value", "logprobs"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"min_p": 1.5}, "invalid_value", "min_p"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"frequency_penalty": 2.5}, "invalid_value", "frequency_penalty"),
        ({"presence_penalty": -3}, "invalid_value", "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.1"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "invalid_value", "logit_bias"),
        ({"bad_words": ["x"] * 129}, "invalid_value", "bad_words"),
        ({"bad_words": [""]}, "invalid_value", "bad_words[0]"),
        ({"allowed_token_ids": [-1]}, "invalid_value", "allowed_token_ids[0]"),
        ({"prompt_logprobs": 21}, "invalid_value", "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
        ({"timeout_seconds": 0}, "invalid_value", "timeout_seconds"),
        ({"cache_salt": "a b"}, "invalid_value", "cache_salt"),
        ({"cache_salt": "a" * 129}, "invalid_value", "cache_salt"),
        ({"priority": 1001}, "invalid_value", "priority"),
        ({"chat_template": "x"}, "unsupported_parameter", "chat_template"),
        ({"chat_template_kwargs": {"tools": 1}}, "invalid_value", "chat_template_kwargs.tools"),
        ({"nonsense": 1}, "unsupported_parameter", "nonsense"),
        ({"stream_options": {"x": 1}}, "unsupported_parameter", "stream_options.x"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 5}, "invalid_value", "max_completion_tokens"),
        ({"min_tokens": 9}, "invalid_value", "min_tokens"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ["a" * 257]}, "invalid_value", "stop[0]"),
        ({"stop": [""]}, "invalid_value", "stop[0]"),
        ({"stream": "yes"}, "invalid_value", "stream"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": None}, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "x", "content": ""}]}, "invalid_value", "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "unsupported_parameter",
            "messages[0].content[0].image_url",
        ),
    ],
)
def test_chat_refusal_names_the_field(worker, change, code, param):
    reply = post(worker, "/v1/chat/completions", CHAT | change)
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (400, code, param)
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"echo": "yes"}, "invalid_value", "echo"),
        ({"logprobs": 21}, "invalid_value", "logprobs"),
        ({"best_of": 1, "n": 2}, "invalid_value", "best_of"),
        ({"best_of": 2, "stream": True}, "invalid_value", "best_of"),
        ({"prompt": ["a"] * 64, "n": 9}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"logit_bias": {"260": 1}}, "invalid_token_id", None),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt[0]"),
        ({"prompt": ["a"] * 65}, "invalid_value", "prompt"),
        ({"prompt": [1, -2]}, "invalid_value", "prompt[0][1]"),
        ({"prompt": [1, 4000]}, "invalid_token_id", "prompt"),
        ({"prompt": "a" * 512}, "context_length_exceeded", "prompt"),
        ({"prompt": "a" * 500, "max_tokens": 13}, "context_length_exceeded", "max_tokens"),
    ],
)
def test_completion_refusal_names_the_field(worker, change, code, param):
    reply = post(worker, "/v1/completions", TEXT | change)
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize(
    "change",
    [
        {"stop": None, "seed": None, "tools": None},
        {"user": "u", "metadata": {"a": "b"}, "store": False},
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"max_completion_tokens": 4},
        {"stop": ["a" * 256]},
    ],
)
def test_absent_neutral_and_accepted_fields_pass(worker, change):
    assert post(worker, "/v1/chat/completions", CHAT | change).status_code == 200


def test_prompt_at_the_context_limit_passes(worker):
    body = TEXT | {"prompt": "a" * 500, "max_tokens": 12}
    reply = post(worker, "/v1/completions", body)
    assert reply.json()["usage"]["total_tokens"] == 512


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800"}'],
)
def test_broken_json_is_a_400(worker, body):
    reply = post(worker, "/v1/completions", body)
    assert (reply.status_code, error_of(reply)["code"]) == (400, "invalid_json")


def test_unknown_model_is_a_404(worker):
    with (
        openai.OpenAI(base_url=worker.api + "/v1", api_key="k", max_retries=0) as client,
        pytest.raises(openai.NotFoundError) as caught,
    ):
        client.chat.completions.create(**(CHAT | {"model": "gpt-x"}))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.type == "not_found_error"
    assert "'tiny'" in caught.value.message


def test_unknown_route_and_wrong_method(worker):
    reply = httpx.get(worker.api + "/v1/nothing")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "unknown_route")
    reply = httpx.get(worker.api + "/v1/completions")
    assert (reply.status_code, error_of(reply)["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    reply = httpx.post(worker.api + "/v1/models/", json={})
    assert reply.status_code == 405
    reply = httpx.post(worker.admin + "/stats")
    assert (reply.status_code, error_of(reply)["code"]) == (405, "method_not_allowed")
    assert httpx.get(worker.api + "/stats").status_code == 404


def test_body_limit_holds_at_the_byte(worker):
    limit = 4 * 2**20
    head, tail = b'{"model": "tiny", "prompt": "', b'"}'
    fits = head + b"a" * (limit - len(head) - len(tail)) + tail
    assert error_of(post(worker, "/v1/completions", fits))["code"] == "context_length_exceeded"
    reply = post(worker, "/v1/completions", fits + b" ")
    assert (reply.status_code, error_of(reply)["code"]) == (413, "body_too_large")


def test_body_is_counted_while_it_is_read(worker):
    """Without Content-Length the refusal comes before the body's end."""
    with socket.create_connection(("127.0.0.1", worker.api_port), 20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(b"400001\r\n" + b"a" * 0x400001 + b"\r\n")  # and no last chunk
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_header_limits_hold(worker):
    def status(count):
        headers = {f"X-{n}": "v" for n in range(count)}
        return httpx.get(worker.api + "/version", headers=headers).status_code

    fixed = len(httpx.get(worker.api + "/version").request.headers)
    assert status(64 - fixed) == 200
    assert status(65 - fixed) == 400
    long = httpx.get(worker.api + "/version", headers={"X-Long": "v" * 16 * 1024})
    assert (long.status_code, error_of(long)["code"]) == (400, "invalid_value")


def test_request_that_breaks_its_step_fails_alone(worker):
    """Token 259 makes the fake device raise: a 500 for this client, which must not retry it."""
    reply = post(worker, "/v1/completions", TEXT | {"prompt": [1, 259]})
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["type"]) == (
        500,
        "internal_error",
        "server_error",
    )
    assert "poison" not in error["message"]
    assert reply.headers["x-should-retry"] == "false"
    stream = post(worker, "/v1/completions", TEXT | {"prompt": [1, 259], "stream": True})
    events = stream.text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert events[-1] == "data: [DONE]"
    assert post(worker, "/v1/completions", TEXT).status_code == 200


def test_openai_raises_on_an_error_event(worker):
    with openai.OpenAI(base_url=worker.api + "/v1", api_key="k", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt=[1, 259], stream=True)
        with pytest.raises(openai.APIError):
            list(stream)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_blocks(worker, stream):
    before = worker.stats()["counters"]["aborts"]
    body = json.dumps(TEXT | {"max_tokens": 500, "prompt": "x", "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", worker.api_port), 20) as connection:
        connection.sendall(head.encode() + body)
        worker.wait(lambda: worker.stats()["gauges"]["running"] == 1, 20)
        steps = worker.stats()["counters"]["steps"]
    stats = worker.wait_idle()
    assert stats["counters"]["aborts"] == before + 1
    assert stats["counters"]["steps"] - steps < 250  # 500 tokens would take 500 steps
    assert stats["gauges"]["running"] == stats["gauges"]["waiting"] == 0


def test_worker_is_whole_after_all_this(worker):
    worker.wait_idle()
    assert httpx.get(worker.admin + "/readyz").status_code == 200
    assert httpx.get(worker.admin + "/livez").status_code == 200
    kv = httpx.get(worker.admin + "/kv").json()
    assert kv["used"] == 0
    assert kv["cached"] + kv["free"] + kv["spare"] == kv["total"] == 256 * 4096
    assert "Traceback" not in worker.log.replace("broke its step\nTraceback", "")
