"""A tokenizer folder without any download, and worker processes that tests talk to."""

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import httpx
import numpy
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Of a model that calls tools in Qwen's way and thinks when it is told to.
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>Answer with <tool_call>.{% endif %}"
    + CHAT_TEMPLATE
    + "{% if enable_thinking %}<think>{% endif %}"
)
SMALL = ["--kv-cache-memory", "4Mi", "--threads", "1"]
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
SCRIPT = Path(__file__).with_name("fake_engine_worker.py")
START_SECONDS = 200


@pytest.fixture(scope="module", autouse=True)
def _one_tls_context() -> Iterator[None]:
    """No test here speaks TLS, but each `httpx.get` would read all authorities anew: 30 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with 256 symbols and no merges; ids 256 and 257 are special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>"), AddedToken("<|start|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    return folder


@dataclass
class RunningWorker:
    """A worker process and where it listens."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    api_port: int = 0
    admin_port: int = 0
    listening: threading.Event = field(default_factory=threading.Event)
    reader: threading.Thread | None = None

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    def read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"listening: api port (\d+), admin port (\d+)", line)
            if found:
                self.api_port, self.admin_port = int(found[1]), int(found[2])
                self.listening.set()
        self.listening.set()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def stats(self) -> dict:
        return httpx.get(self.admin + "/stats").json()

    def wait_ready(self) -> "RunningWorker":
        assert self.listening.wait(START_SECONDS), self.log
        assert self.api_port, self.log
        self.wait(self.is_ready)
        return self

    def is_ready(self) -> bool:
        try:
            return httpx.get(self.admin + "/readyz", timeout=10).status_code == 200
        except httpx.TransportError:  # the import of torch can hold the interpreter for seconds
            return False

    def wait(self, fact: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait until a fact holds; the process must live on."""
        end = time.monotonic() + seconds
        while not fact():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.01)

    def wait_idle(self) -> dict:
        """Wait until no request holds a KV block; the final stats."""
        self.wait(lambda: self.stats()["gauges"]["kv_blocks_used"] == 0, 20)
        return self.stats()

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


StartWorker = Callable[..., RunningWorker]


def start_process(command: list[str]) -> RunningWorker:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    worker = RunningWorker(process)
    worker.reader = threading.Thread(target=worker.read_log, daemon=True)
    worker.reader.start()
    return worker


def stop_process(worker: RunningWorker) -> None:
    if worker.process.poll() is None:
        worker.process.kill()
    worker.process.wait()
    assert worker.reader is not None
    worker.reader.join()
    assert worker.process.stderr is not None
    worker.process.stderr.close()


@pytest.fixture
def start_worker(tokenizer_folder: Path) -> Iterator[StartWorker]:
    """Start a worker over the fake runner; keyword arguments become flags."""
    started = []

    def start(*flags: str, step_seconds: float = 0.0, load_seconds: float = 0.0) -> RunningWorker:
        command = [sys.executable, str(SCRIPT), str(step_seconds), str(load_seconds)]
        fixed = ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0"]
        if "--model" not in flags:
            fixed += ["--model", str(tokenizer_folder)]
        if "--removal-delay" not in flags:
            fixed += ["--removal-delay", "0.2s"]
        started.append(start_process(command + fixed + list(flags)))
        return started[-1]

    yield start
    for worker in started:
        stop_process(worker)


@pytest.fixture(scope="module")
def worker(tokenizer_folder: Path) -> Iterator[RunningWorker]:
    """One worker that the tests of a module share."""
    flags = ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0"]
    flags += ["--model", str(tokenizer_folder), "--kv-cache-memory", "1Mi"]
    running = start_process([sys.executable, str(SCRIPT), "0.002", "0", *flags])
    try:
        yield running.wait_ready()
    finally:
        stop_process(running)


@pytest.fixture(scope="session")
def start_real() -> Iterator[StartWorker]:
    """Start a worker with the real engine, as its image does."""
    started = []

    def start(*flags: str) -> RunningWorker:
        command = [sys.executable, "-m", "tilefleet_worker", "serve"]
        fixed = ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0"]
        started.append(start_process(command + fixed + list(flags)))
        return started[-1]

    yield start
    for worker in started:
        stop_process(worker)


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
        "max_position_embeddings": 2048,
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


@pytest.fixture(scope="session")
def model(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("real") / "qwen3-tiny"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "</think>"])  # ids 258 and 259
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": TOOL_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def real(model, start_real):
    host = ("--kv-offloading-size", "6Mi")
    return start_real("--model", f"file://{model}", *SMALL, *host).wait_ready()
