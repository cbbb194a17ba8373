"""The worker as its image starts it: real engine, tiny random Qwen3, real tokenizer."""

import json
import subprocess
import sys

import httpx
import openai
import pytest

COMMAND = [sys.executable, "-m", "tilefleet_worker", "serve"]
FLAGS = ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--removal-delay", "0s"]
SMALL = ["--kv-cache-memory", "4Mi", "--threads", "1"]


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=real.api + "/v1", api_key="k", max_retries=0) as client:
        yield client


def run_to_end(*flags):
    """Start a worker that must not come up; its exit status and its log."""
    done = subprocess.run(
        [*COMMAND, *FLAGS, *SMALL, *flags], capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stderr


def test_completion_decodes_real_tokens(client):
    reply = client.completions.create(
        model="qwen3-tiny",
        prompt="The quick brown fox",
        max_tokens=32,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert reply.choices[0].text
    assert reply.usage.completion_tokens == 32
    assert reply.usage.prompt_tokens == 19


def test_chat_streams_what_it_answers_at_once(client):
    fields = {
        "model": "qwen3-tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 40,
        "seed": 5,
        "top_p": 0.9,
        "extra_body": {"top_k": 40},
    }
    whole = client.chat.completions.create(**fields)
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_concurrent_requests_get_the_answers_they_get_alone(real):
    def body(n):
        return {"model": "qwen3-tiny", "prompt": f"Story {n}: ", "max_tokens": 24, "temperature": 0}

    alone = [httpx.post(real.api + "/v1/completions", json=body(n), timeout=60) for n in range(4)]
    together = httpx.post(
        real.api + "/v1/completions",
        json=body(0) | {"prompt": [body(n)["prompt"] for n in range(4)]},
        timeout=60,
    )
    texts = [reply.json()["choices"][0]["text"] for reply in alone]
    assert [choice["text"] for choice in together.json()["choices"]] == texts


def test_stats_name_device_config_and_phases(real):
    stats = real.stats()
    assert stats["device"]["kind"] == "cpu"
    assert {p["phase"] for p in stats["startup"]} == {
        "import",
        "download",
        "weights",
        "pool",
        "warmup",
    }
    assert "auto" not in json.dumps(stats["config"])
    kv = httpx.get(real.admin + "/kv").json()
    causes = ("used", "wasted", "cached", "free", "spare")
    assert sum(kv[cause] for cause in causes) == kv["total"] <= 4 * 2**20
    assert kv["total"] > 3 * 2**20
    assert kv["host"]["cached"] + kv["host"]["free"] == kv["host"]["total"] == 6 * 2**20
    assert sum(kind["on_host"] for kind in kv["kinds"]) == kv["host"]["cached"]


def test_a_prefix_that_was_evicted_comes_back_from_the_host(real):
    """The answer is the same, and the metrics say where its prompt came from."""
    spare = {"model": "qwen3-tiny", "max_tokens": 8, "temperature": 0, "logprobs": 1}

    def ask(number):
        prompt = f"{number} and so on " * 90
        reply = httpx.post(
            real.api + "/v1/completions", json=spare | {"prompt": prompt}, timeout=90
        )
        return reply.json()["choices"][0]["text"], reply.json()["choices"][0]["logprobs"]

    def counted(name):
        page = httpx.get(real.admin + "/metrics").text
        (line,) = [line for line in page.splitlines() if line.startswith(name) and "{" in line]
        return float(line.split()[-1])

    first = ask(0)
    hits = "vllm:external_prefix_cache_hits_total"
    before = counted(hits)
    for number in range(1, 12):  # more than the pool holds
        ask(number)
    assert ask(0) == first
    assert counted(hits) - before > 1000
    assert counted("vllm:external_prefix_cache_queries_total") > counted(hits)


def test_truncated_weights_are_named(model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:-100] if file.suffix == ".safetensors" else data)
    status, log = run_to_end("--model", str(broken))
    assert status == 3
    assert "ModelError" in log
    assert "model.safetensors" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file_is_named(model, tmp_path, name):
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in model.iterdir():
        if file.name != name:
            (partial / file.name).symlink_to(file)
    status, log = run_to_end("--model", str(partial))
    assert status == 3
    assert name in log
    assert "Traceback" not in log


def test_model_length_above_the_models_own_is_refused(model):
    status, log = run_to_end("--model", str(model), "--max-model-len", "4096")
    assert status == 2
    assert "4096" in log
    assert "2048" in log
