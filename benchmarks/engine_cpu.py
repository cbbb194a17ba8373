"""Tokens per second of the engine on a CPU, beside transformers `generate` in the same process.

python benchmarks/engine_cpu.py [--model DIR | --shape NAME] [--streams 1 8 32] [--prompt 512]
                                [--answer 128]

Both decode greedily, in fp32, with the same number of threads, prompts and tokens. They take
turns, and each figure is the median of its turns, so that a busy machine slows both. Writes one
JSON line per case. Tokens per second count generated tokens, the prompt's time included.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tilefleet_worker.engine import Engine
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.factory import build_engine
from tilefleet_worker.request import Delta, Request, SamplingParams

ROOT = Path(__file__).parents[1]
# hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary; random weights, tied
SHAPES = {"qwen3-0.5b": (896, 4864, 24, 14, 2, 64, 151_936)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-model/model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of --model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_prompts(streams: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of one length, so that the peer needs no padding."""
    generator = torch.Generator().manual_seed(streams)
    return torch.randint(3, vocab_size, (streams, length), generator=generator).tolist()


def random_model(shape: str, folder: Path) -> Path:
    """A Qwen3 of that shape, saved in bf16 as published ones are."""
    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, head_dim=head_dim,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


class Engines:
    """The engine with a sink that counts, and the peer, behind the same call."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = EngineConfig(
            threads=options.threads, prefix_caching=False, kv_cache_bytes=2 * 2**30
        )
        self.engine: Engine = build_engine(options.model, config)
        self.peer = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        self.peer.generation_config.eos_token_id = (
            None  # as with ignore_eos: both generate to the end
        )
        self.answer: int = options.answer
        self._tokens: dict[str, list[int]] = {}
        self._left = 0
        self._done = threading.Event()
        self._turn = 0
        self.engine.set_sink(self._sink)
        self.engine.start()

    def _sink(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._tokens[delta.request_id] += delta.token_ids
            self._left -= delta.finish_reason is not None
        if not self._left:
            self._done.set()

    def run_engine(self, prompts: list[list[int]]) -> list[list[int]]:
        """Generate with the engine, all prompts submitted at once."""
        self._turn += 1
        names = [f"{self._turn}-{index}" for index in range(len(prompts))]
        self._tokens = {name: [] for name in names}
        self._left = len(names)
        self._done.clear()
        params = SamplingParams(max_tokens=self.answer, temperature=0.0, ignore_eos=True)
        for name, prompt in zip(names, prompts, strict=True):
            refusal = self.engine.submit(Request(name, prompt, params, time.monotonic()))
            if refusal is not None:
                raise SystemExit(refusal.message)
        if not self._done.wait(600):
            raise SystemExit("the engine gave no answer in 600 s")
        return [self._tokens[name] for name in names]

    def run_peer(self, prompts: list[list[int]]) -> list[list[int]]:
        """Generate with transformers, all prompts as one batch."""
        inputs = torch.tensor(prompts)
        with torch.inference_mode():
            made = self.peer.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.answer,
                do_sample=False,
                temperature=None,
                top_p=None,
                pad_token_id=0,
            )
        return made[:, inputs.shape[1] :].tolist()


def tokens_per_second(
    run: Callable[[list[list[int]]], list[list[int]]], prompts: list[list[int]]
) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    tokens = run(prompts)
    return sum(map(len, tokens)) / (time.perf_counter() - began), tokens


def measure(engines: Engines, prompts: list[list[int]], turns: int) -> tuple[float, float, int]:
    """Medians of the engine and of the peer, and how many tokens both agree on."""
    own, peer, agreed = [], [], 0
    for turn in range(turns + 1):
        own_rate, own_tokens = tokens_per_second(engines.run_engine, prompts)
        peer_rate, peer_tokens = tokens_per_second(engines.run_peer, prompts)
        if turn:  # the first turn warms both up
            own.append(own_rate)
            peer.append(peer_rate)
        pairs = zip(own_tokens, peer_tokens, strict=True)
        agreed = sum(a == b for left, right in pairs for a, b in zip(left, right, strict=True))
    return statistics.median(own), statistics.median(peer), agreed


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            options.model = random_model(options.shape, Path(folder))
        run(options)


def run(options: argparse.Namespace) -> None:
    """Measure every number of streams."""
    torch.set_num_threads(options.threads)
    engines = Engines(options)
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    device = f"{platform.machine()} {engines.engine.info.device['arch']}, {options.threads} threads"
    name = options.shape or options.model.parent.name
    for streams in options.streams:
        prompts = make_prompts(streams, options.prompt, engines.engine.info.vocab_size)
        own, peer, agreed = measure(engines, prompts, options.turns)
        line = {
            "bench": "engine_cpu",
            "case": f"{name}, {streams} streams, {options.prompt} + {options.answer} tokens, fp32",
            "value": round(own, 1),
            "unit": "tok/s",
            "peer": "transformers generate",
            "peer_value": round(peer, 1),
            "ratio": round(own / peer, 2),
            "equal_tokens": agreed / (streams * options.answer),
            "device": device,
            "commit": commit,
        }
        print(json.dumps(line), flush=True)
    engines.engine.stop()


if __name__ == "__main__":
    main()
