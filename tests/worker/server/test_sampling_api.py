"""Sampling fields over HTTP on the real tiny model: scores, siblings, echo, bias, stops."""

import json
import math

import httpx
import pytest

TEXT = {"model": "qwen3-tiny", "prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0}
CHAT = {
    "model": "qwen3-tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 6,
    "temperature": 0,
}


def complete(real, **change):
    reply = httpx.post(real.api + "/v1/completions", json=TEXT | change, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(real, path, body):
    with httpx.stream("POST", real.api + path, json=body | {"stream": True}, timeout=60) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_reads_it(real):
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234}
    choice = complete(real, **fields)["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"][:-1]) == TEXT["prompt"]
    assert choice["text"].startswith(TEXT["prompt"])
    assert len(found["tokens"]) == len(TEXT["prompt"]) + 1
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    rest = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    for token, logprob, top in list(rest)[1:]:
        assert top[token] == logprob <= max(top.values())
    assert found["text_offset"][:5] == [0, 1, 2, 3, 4]
    again = complete(real, **fields)["choices"][0]["logprobs"]
    assert again == found  # also with its prefix in the cache


def test_echo_without_an_answer_scores_only_the_prompt(real):
    body = complete(real, echo=True, logprobs=0, max_tokens=0)
    choice = body["choices"][0]
    assert choice["text"] == TEXT["prompt"]
    assert len(choice["logprobs"]["tokens"]) == len(TEXT["prompt"])
    assert body["usage"]["completion_tokens"] == 0


def test_a_client_says_how_long_it_waits(real):
    body = TEXT | {"max_tokens": 200, "ignore_eos": True, "timeout_seconds": 0.001}
    reply = httpx.post(real.api + "/v1/completions", json=body, timeout=60)
    assert (reply.status_code, reply.headers["x-should-retry"]) == (408, "false")
    error = reply.json()["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")
    assert len(complete(real, timeout_seconds=600)["choices"]) == 1


def test_greedy_logprobs_are_the_highest_and_equal_in_a_stream(real):
    whole = complete(real, logprobs=3)["choices"][0]["logprobs"]
    assert len(whole["tokens"]) == 8
    for token, logprob, top in zip(
        whole["tokens"], whole["token_logprobs"], whole["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())
    chunks = [
        c["choices"][0]["logprobs"] for c in events(real, "/v1/completions", TEXT | {"logprobs": 3})
    ]
    for name in whole:
        assert [item for chunk in chunks for item in chunk[name]] == whole[name]


def test_chat_logprobs_name_tokens_bytes_and_the_likeliest(real):
    fields = CHAT | {"logprobs": True, "top_logprobs": 2}
    reply = httpx.post(real.api + "/v1/chat/completions", json=fields, timeout=60).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == reply["usage"]["completion_tokens"]
    for entry in content:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
    streamed = [
        entry
        for chunk in events(real, "/v1/chat/completions", fields)
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {}).get("content", [])
    ]
    assert streamed == content


def test_prompt_logprobs_have_vllms_shape(real):
    choice = complete(real, prompt_logprobs=2)["choices"][0]
    found = choice["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == len(TEXT["prompt"])
    for entry in found[1:]:
        assert 2 <= len(entry) <= 3
        best = min(entry.values(), key=lambda item: item["rank"])
        assert best["rank"] == 1
        assert best["logprob"] == max(item["logprob"] for item in entry.values())
    assert "prompt_logprobs" not in complete(real)["choices"][0]


def test_n_answers_share_a_prompt_and_draw_their_own_numbers(real):
    body = complete(real, prompt=["a" * 40, "b" * 40], n=3, temperature=1.0, seed=5)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert len({choice["text"] for choice in body["choices"]}) == 6
    assert body["usage"]["prompt_tokens"] == 80
    assert (
        complete(real, prompt=["a" * 40], n=3, temperature=1.0, seed=5)["choices"]
        == (body["choices"][:3])
    )
    alone = complete(real, prompt="a" * 40, temperature=1.0, seed=7)["choices"][0]["text"]
    assert alone == body["choices"][2]["text"]  # seeds follow one another
    streams = events(real, "/v1/completions", TEXT | {"n": 3, "temperature": 1.0, "seed": 5})
    assert {chunk["choices"][0]["index"] for chunk in streams} == {0, 1, 2}


def test_best_of_shows_the_likeliest(real):
    fields = {"temperature": 1.5, "seed": 11, "logprobs": 0}
    every = complete(real, n=6, **fields)["choices"]

    def mean(choice):
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = complete(real, n=2, best_of=6, **fields)["choices"]
    expected = sorted(every, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best] == [choice["text"] for choice in expected]
    assert [choice["index"] for choice in best] == [0, 1]
    assert "logprobs" in best[0]
    hidden = complete(real, n=1, best_of=6, temperature=1.5, seed=11)["choices"][0]
    assert (hidden["text"], hidden["logprobs"]) == (best[0]["text"], None)


def test_bias_bad_words_and_allowed_tokens_hold(real):
    plain = complete(real)["choices"][0]["text"]
    assert set(complete(real, logit_bias={"65": 100.0})["choices"][0]["text"]) == {
        httpx.post(real.api + "/detokenize", json={"tokens": [65]}).json()["prompt"]
    }
    ids = httpx.post(real.api + "/tokenize", json={"prompt": "xy"}).json()["tokens"]
    text = complete(real, allowed_token_ids=ids, temperature=1.0)["choices"][0]["text"]
    assert set(text) <= {"x", "y"}
    word = complete(real, allowed_token_ids=ids)["choices"][0]["text"][0]
    banned = complete(real, allowed_token_ids=ids, bad_words=[word])["choices"][0]["text"]
    assert word not in banned
    assert complete(real)["choices"][0]["text"] == plain


def test_penalties_change_a_repetition(real):
    ids = httpx.post(real.api + "/tokenize", json={"prompt": "xyz"}).json()["tokens"]
    plain = complete(real, allowed_token_ids=ids, max_tokens=30)["choices"][0]["text"]
    spread = complete(real, allowed_token_ids=ids, max_tokens=30, frequency_penalty=2.0)
    counts = sorted(spread["choices"][0]["text"].count(letter) for letter in "xyz")
    assert counts[0] > min(plain.count(letter) for letter in "xyz") or counts[0] >= 5


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_as_stop_and_is_no_abort(real, include):
    ids = httpx.post(real.api + "/tokenize", json={"prompt": "xyz"}).json()["tokens"]
    fields = {"allowed_token_ids": ids, "max_tokens": 40, "temperature": 1.0, "seed": 3}
    text = complete(real, **fields)["choices"][0]["text"]
    stop = text[9:11]
    before = real.wait_idle()["counters"]
    choice = complete(real, stop=stop, include_stop_str_in_output=include, **fields)["choices"][0]
    assert choice["finish_reason"] == "stop"
    at = text.find(stop)
    assert choice["text"] == text[: at + 2 * include]
    after = real.wait_idle()["counters"]
    assert after["completions"] == before["completions"] + 1
    assert after["aborts"] == before["aborts"]


def test_truncation_keeps_the_end_of_the_prompt(real):
    kept = complete(real, truncate_prompt_tokens=5)
    assert kept["usage"]["prompt_tokens"] == 5
    assert kept["choices"][0]["text"] == complete(real, prompt="n fox")["choices"][0]["text"]


def test_the_salt_of_a_client_separates_its_cache(real):
    def cached(**change):
        usage = complete(real, prompt="s" * 64, **change)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(cache_salt="one") == 0
    assert cached(cache_salt="one") == 48
    assert cached(cache_salt="two") == 0


def test_scores_sum_to_less_than_one(real):
    found = complete(real, logprobs=20, temperature=1.0, seed=1)["choices"][0]["logprobs"]
    for top in found["top_logprobs"]:
        assert sum(map(math.exp, top.values())) <= 1 + 1e-9
