"""The worker as its image starts it: real engine, tiny random Qwen3, real tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy
import openai
import pytest
from safetensors.numpy import save_file

COMMAND = [sys.executable, "-m", "tilefleet_worker", "serve"]
FLAGS = ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--removal-delay", "0s"]
LAYER = {
    "input_layernorm": (64,),
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "self_attn.q_norm": (16,),
    "self_attn.k_norm": (16,),
    "post_attention_layernorm": (64,),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
SMALL = ["--kv-cache-memory", "4Mi", "--threads", "1"]


def write_model(folder: Path) -> None:
    """A random Qwen3 with the byte tokenizer's vocabulary, in Hugging Face layout.

    Written with numpy: importing transformers costs more than all tests here. That the engine's
    tokens equal those of transformers is proved beside the engine.
    """
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 257,
        "eos_token_id": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = numpy.random.default_rng(7)
    shapes = {"embed_tokens.weight": (264, 64), "norm.weight": (64,)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
    tensors = {
        f"model.{name}": (
            random.standard_normal(shape, numpy.float32) * 0.2
            if len(shape) == 2
            else numpy.ones(shape, numpy.float32)
        )
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("real") / "qwen3-tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((tokenizer_folder / name).read_text())
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def real(model, start_real):
    return start_real("--model", f"file://{model}", *SMALL).wait_ready()


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
    assert kv["used"] + kv["cached"] + kv["free"] == kv["total"] <= 4 * 2**20
    assert kv["total"] > 3 * 2**20


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
    status, log = run_to_end("--model", str(model), "--max-model-len", "1024")
    assert status == 2
    assert "1024" in log
    assert "512" in log
