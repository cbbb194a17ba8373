"""Requests of every shape, many at once, on the real engine: it never ends, and each gets one end.

TILEFLEET_FUZZ_REQUESTS sets how many (`make test-fuzz`: 100,000); the seed is in the failure.
"""

import asyncio
import contextlib
import json
import os
import random

import httpx

NUM_REQUESTS = int(os.environ.get("TILEFLEET_FUZZ_REQUESTS", "1000"))
SEED = int(os.environ.get("TILEFLEET_FUZZ_SEED", "1"))
CONCURRENCY = 16
EXPECTED = {200, 400, 404, 413, 429, 500}

TEXTS = [
    "",
    "a",
    "hello " * 20,
    "\x00",
    "é" * 9,
    "日本語",
    "👩‍👩‍👧‍👦",
    "\u202e",
    "a\u0301",
    "<|end|>",
    "</think>",
    "<tool_call>",
    "\ufeff",
    " \n\t",
    "x" * 3000,
    "{{ 7 * 7 }}",
    "%s%n",
    "\ud7ff",
    "\U0010ffff",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    0.5,
    1.0,
    1e-9,
    1e9,
    -0.0,
    2**31,
    2**63,
    -(2**63),
    1e308,
    True,
    "1",
    None,
    [],
    {},
]
SCHEMAS = [
    {"type": "object"},
    {"type": "boolean"},
    {"enum": ["a", 1, None]},
    {"type": "nonsense"},
    {"const": "x"},
    {"type": "array", "items": {"$ref": "#"}},
    {"$ref": "http://x/y"},
    {},
    {"enum": []},
    {"type": "string", "pattern": "(a|b)*c"},
    {"type": "integer", "minimum": 3, "maximum": 2},
]
PATTERNS = [
    "a*",
    "[ab]{3}",
    "(((",
    "(?=x)",
    "(a|b)*a(a|b){40}",
    ".",
    "",
    "\\p{L}+",
    "x{1000}{1000}",
]
GRAMMARS = [
    'start: "a" | B\nB: /[0-9]+/',
    "start: nothing",
    'root ::= "x" root | "y"',
    "root ::= (",
    "{}",
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def text(rng):
    return (
        rng.choice(TEXTS)
        if rng.random() < 0.7
        else "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(40)))
    )


def ids(rng):
    known = [rng.randrange(256) for _ in range(rng.randrange(1, 60))]
    return [*known, rng.choice(UNKNOWN_IDS)] if rng.random() < 0.2 else known


# ASCII, the first plane below the surrogates, all others.
RANGES = [(32, 127), (0x80, 0xD7FF), (0x10000, 0x10FFFF)]
UNKNOWN_IDS = [256, 258, 263, 264, -1, 10**9]
FIELDS = {
    "temperature": lambda r: r.choice([0, 0.3, 1, 2, *NUMBERS]),
    "top_p": lambda r: r.choice([0.1, 0.9, 1, *NUMBERS]),
    "top_k": lambda r: r.choice([-1, 1, 5, 10**6, *NUMBERS]),
    "min_p": lambda r: r.choice([0.1, 1, *NUMBERS]),
    "seed": lambda r: r.choice([1, 2**62, *NUMBERS]),
    "n": lambda r: r.choice([1, 2, 4, 129, *NUMBERS]),
    "best_of": lambda r: r.choice([1, 3, 129]),
    "stop": lambda r: r.choice(["a", ["a", "b"], [], [""], ["x" * 257], "\n", None, [text(r)]]),
    "stop_token_ids": lambda r: r.choice([[65], [], ids(r)]),
    "min_tokens": lambda r: r.choice([0, 3, 500, *NUMBERS]),
    "ignore_eos": lambda r: r.choice([True, False, 1]),
    "repetition_penalty": lambda r: r.choice([0.5, 1.3, 10, *NUMBERS]),
    "frequency_penalty": lambda r: r.choice([-2, 1.5, *NUMBERS]),
    "presence_penalty": lambda r: r.choice([2, -1, *NUMBERS]),
    "logit_bias": lambda r: r.choice(
        [{"65": 100}, {"65": -100}, {"999": 1}, {"x": 1}, {}, {"263": 100}]
    ),
    "bad_words": lambda r: r.choice([["a"], ["", "b"], [text(r)], ["ab", "cd"]]),
    "allowed_token_ids": lambda r: r.choice([[65, 66], [], [264], [256]]),
    "logprobs": lambda r: r.choice([True, 0, 1, 20, 21, None]),
    "top_logprobs": lambda r: r.choice([0, 2, 20, 21]),
    "prompt_logprobs": lambda r: r.choice([0, 1, 20, 21]),
    "echo": lambda r: r.choice([True, False]),
    "cache_salt": lambda r: r.choice(["a", "b", "", "x" * 129, "a b", text(r)]),
    "truncate_prompt_tokens": lambda r: r.choice([1, 5, 0, *NUMBERS]),
    "priority": lambda r: r.choice([0, -5, 7, 10**6]),
    "skip_special_tokens": lambda r: r.choice([True, False]),
    "include_stop_str_in_output": lambda r: r.choice([True, False]),
    "stream_options": lambda r: r.choice(
        [{"include_usage": True}, {"continuous_usage_stats": True}, {}]
    ),
    "response_format": lambda r: r.choice(
        [
            {"type": "json_object"},
            {"type": "text"},
            {"type": "x"},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": r.choice(SCHEMAS)}},
        ]
    ),
    "structured_outputs": lambda r: r.choice(
        [
            {"regex": r.choice(PATTERNS)},
            {"choice": [text(r)]},
            {"json": r.choice(SCHEMAS)},
            {"grammar": r.choice(GRAMMARS)},
            {},
        ]
    ),
    "guided_regex": lambda r: r.choice(PATTERNS),
    "guided_grammar": lambda r: r.choice(GRAMMARS),
    "tools": lambda r: r.choice([[TOOL], [], [{}], [TOOL, TOOL]]),
    "tool_choice": lambda r: r.choice(
        [
            "auto",
            "none",
            "required",
            "x",
            {"type": "function", "function": {"name": r.choice("fg")}},
        ]
    ),
    "chat_template_kwargs": lambda r: r.choice([{"enable_thinking": True}, {"x": 1}, {}]),
    "nonsense": lambda r: r.choice(NUMBERS),
}


def make_body(rng):
    """Path and body of one request; most fields are left out, so that many requests are valid."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions"])
    body = {
        "model": rng.choice(["qwen3-tiny"] * 19 + ["other"]),
        "max_tokens": rng.randrange(1, 24),
    }
    if path == "/v1/completions":
        kinds = [text(rng), [text(rng), "b"], ids(rng), [ids(rng), [65]]]
        body["prompt"] = rng.choice(kinds)
    else:
        roles = ["user", "system", "assistant", "tool", "x"]
        body["messages"] = [
            {"role": rng.choice(roles[:3] if rng.random() < 0.9 else roles), "content": text(rng)}
            for _ in range(rng.randrange(1, 4))
        ]
    for name in rng.sample(sorted(FIELDS), rng.choice([0, 1, 1, 2, 3, 5])):
        body[name] = FIELDS[name](rng)
    body["stream"] = rng.random() < 0.5
    return path, body


def check_whole(reply):
    body = reply.json()
    if reply.status_code != 200:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length", "tool_calls")
    assert body["usage"]["total_tokens"] >= 1


def check_stream(reply, lines):
    if reply.status_code != 200:
        return
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert events.count("[DONE]") == 1
    bodies = [json.loads(event) for event in events[:-1]]
    errors = [body for body in bodies if "error" in body]
    choices = [choice for body in bodies for choice in body.get("choices", [])]
    ends = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert len(ends) == len(set(ends))
    assert len(errors) <= 1
    if not errors:
        assert set(ends) == {choice["index"] for choice in choices}


async def one(client, rng, counts):
    path, body = make_body(rng)
    leave_after = rng.randrange(3) if rng.random() < 0.1 else None
    try:
        async with client.stream("POST", path, json=body) as reply:
            assert reply.status_code in EXPECTED, reply.status_code
            counts[reply.status_code] = counts.get(reply.status_code, 0) + 1
            if leave_after is not None:
                return
            if reply.headers["content-type"].startswith("text/event-stream"):
                check_stream(reply, [line async for line in reply.aiter_lines()])
            else:
                await reply.aread()
                check_whole(reply)
    except Exception as error:
        raise AssertionError(f"{path} {json.dumps(body)[:2000]}: {error!r}") from error


async def fuzz(base_url, num_requests):
    rng, counts, left = random.Random(SEED), {}, iter(range(num_requests))
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(base_url=base_url, timeout=300, limits=limits) as client:

        async def work():
            for number in left:
                await one(client, random.Random(rng.random() + number), counts)

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return counts


def test_no_request_of_any_shape_ends_the_engine(real):
    before = real.wait_idle()["counters"]
    try:
        counts = asyncio.run(fuzz(real.api, NUM_REQUESTS))
    except AssertionError as error:
        raise AssertionError(f"seed {SEED}: {error}\n{real.log[-3000:]}") from error
    assert counts[200] > NUM_REQUESTS // 10, counts
    assert counts[400] > NUM_REQUESTS // 10, counts
    after = real.wait_idle()["counters"]
    ended = sum(after[name] - before[name] for name in ("completions", "aborts", "errors"))
    assert ended == after["arrivals"] - before["arrivals"]
    print(f"{NUM_REQUESTS} requests, answers by status: {counts}; {ended} reached the engine")
    assert httpx.get(real.admin + "/readyz").status_code == 200
    kv = httpx.get(real.admin + "/kv").json()
    assert kv["used"] == 0
    assert sum(kv[cause] for cause in ("wasted", "cached", "free", "spare")) == kv["total"]
    assert "the engine ended" not in real.log


async def slow_clients(port, count):
    """Clients that ask for streams and never read; half of them leave without a word."""
    body = json.dumps(
        {"model": "qwen3-tiny", "prompt": "x", "max_tokens": 8, "stream": True}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )

    async def ask(number):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body[: None if number % 3 else 10])
        await writer.drain()
        return writer

    writers = await asyncio.gather(*(ask(number) for number in range(count)))
    for writer in writers[::2]:
        writer.transport.abort()
    async with httpx.AsyncClient(timeout=120) as client:
        fields = {"model": "qwen3-tiny", "prompt": "y", "max_tokens": 4}
        reply = await client.post(f"http://127.0.0.1:{port}/v1/completions", json=fields)
    for writer in writers:
        with contextlib.suppress(ConnectionError):
            writer.close()
    return reply.status_code


def test_clients_that_never_read_or_never_finish_stop_nobody(real):
    count = 1000 if NUM_REQUESTS > 1000 else 300
    assert asyncio.run(slow_clients(real.api_port, count)) in (200, 429)
    real.wait_idle()
    reply = httpx.post(
        real.api + "/v1/completions",
        timeout=60,
        json={"model": "qwen3-tiny", "prompt": "z", "max_tokens": 2},
    )
    assert reply.status_code == 200
