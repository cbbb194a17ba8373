"""Tokens per second of the engine on a CPU, beside transformers `generate` and its continuous
batching in the same process.

python benchmarks/engine_cpu.py [--model DIR] [--shapes qwen3-0.5b] [--streams 1 8 32]
                                [--prompt 512] [--answer 128] [--minutes 10]

All decode greedily, in fp32, with the same number of threads, prompts and tokens. They take turns,
and each figure is the median of its turns, so that a busy machine slows all of them. Tokens per
second count generated tokens, the prompt's time included. One JSON line for each case and peer on
standard output, progress on standard error.

A case starts as long as what it will take, judged by the cases before it, fits the minutes left;
one that is left out is named in a comment line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from tilefleet_worker.engine import Engine
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.factory import build_engine
from tilefleet_worker.request import Delta, Request, SamplingParams

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples/tiny-model/model"
# hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary; random weights, tied
SHAPES = {"qwen3-0.5b": (896, 4864, 24, 14, 2, 64, 151_936)}
PEERS = {"generate": "transformers generate", "continuous": "transformers continuous batching"}
# Most turns of a model with so many bytes of weights: a step of 0.5 B parameters takes 0.2 s.
SMALL_BYTES = 2**26

Prompts = list[list[int]]
Run = Callable[[Prompts, int], list[list[int]]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=TINY, help="folder of a model")
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="random models, after it"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--turns", type=int, default=3, help="of models under 64 MiB; others: 1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--minutes", type=float, default=10.0, help="no case starts behind it")
    return parser.parse_args()


def make_prompts(streams: int, length: int, vocab_size: int) -> Prompts:
    """Random prompts of one length, so that `generate` needs no padding."""
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


class Own:
    """The engine with a sink that counts."""

    def __init__(self, model: Path, threads: int) -> None:
        config = EngineConfig(threads=threads, prefix_caching=False, kv_cache_bytes=2 * 2**30)
        self.engine: Engine = build_engine(model, config)
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

    def run(self, prompts: Prompts, answer: int) -> list[list[int]]:
        """Generate with the engine, all prompts submitted at once."""
        self._turn += 1
        names = [f"{self._turn}-{index}" for index in range(len(prompts))]
        self._tokens = {name: [] for name in names}
        self._left = len(names)
        self._done.clear()
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        for name, prompt in zip(names, prompts, strict=True):
            refusal = self.engine.submit(Request(name, prompt, params, time.monotonic()))
            if refusal is not None:
                raise SystemExit(refusal.message)
        if not self._done.wait(3600):
            raise SystemExit("the engine gave no answer in an hour")
        return [self._tokens[name] for name in names]


class Transformers:
    """One model of transformers behind both of its entry points, as their defaults are."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        # As with ignore_eos: all generate to the end.
        self._model.generation_config.eos_token_id = None

    def _config(self, answer: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=answer, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    def generate(self, prompts: Prompts, answer: int) -> list[list[int]]:
        """All prompts as one batch."""
        inputs = torch.tensor(prompts)
        with torch.inference_mode():
            made = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=self._config(answer),
            )
        return made[:, inputs.shape[1] :].tolist()

    def continuous(self, prompts: Prompts, answer: int) -> list[list[int]]:
        """All prompts at once; as many tokens in a step as the engine's default."""
        pages = sum(-(-(len(prompt) + answer) // 256) for prompt in prompts)
        config = ContinuousBatchingConfig(
            num_blocks=pages + 1, max_batch_tokens=2048, max_requests_per_batch=len(prompts),
            allow_block_sharing=False,
        )  # fmt: skip
        made = self._model.generate_batch(
            inputs=prompts,
            generation_config=self._config(answer),
            continuous_batching_config=config,
        )
        by_prompt = {tuple(found.prompt_ids): found for found in made.values()}
        tokens = [by_prompt[tuple(prompt)].generated_tokens for prompt in prompts]
        if any(len(part) != answer for part in tokens):
            raise RuntimeError(f"answers of {sorted({len(part) for part in tokens})} tokens")
        return tokens


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Bench:
    """Runs the cases of all models within the minutes that it is given."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._deadline = time.perf_counter() + options.minutes * 60
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        self._commit = found.stdout.strip()

    def model(self, name: str, model: Path) -> None:
        """Measure every number of streams that there is time for."""
        options = self._options
        own, peer = Own(model, options.threads), Transformers(model)
        runs: dict[str, Run] = {"own": own.run}
        for kind in options.peers:
            runs[kind] = getattr(peer, kind)
        small = sum(path.stat().st_size for path in model.glob("*.safetensors")) < SMALL_BYTES
        turns = options.turns if small else 1
        vocabulary = own.engine.info.vocab_size
        self._warm_up(name, runs, vocabulary)
        took, before = 0.0, 0
        for streams in options.streams:
            left = self._deadline - time.perf_counter()
            # Less than in proportion: decodes of a batch share the weights' bytes.
            needed = took * (streams / before) ** 0.75 if before else 0.0
            if needed > left or left < 0:
                print(
                    f"# {name}, {streams} streams: left out, about {needed:.0f} s of the "
                    f"{max(left, 0):.0f} s left; --minutes gives more",
                    flush=True,
                )
                continue
            began = time.perf_counter()
            prompts = make_prompts(streams, options.prompt, vocabulary)
            self._case(f"{name}, {streams} streams", runs, prompts, turns)
            took, before = time.perf_counter() - began, streams
        own.engine.stop()

    def _warm_up(self, name: str, runs: dict[str, Run], vocabulary: int) -> None:
        """Two short answers of everybody."""
        for kind in list(runs):
            progress(f"{name}: warming up {kind}")
            self._attempt(runs, kind, make_prompts(2, 16, vocabulary), 4)

    def _attempt(
        self, runs: dict[str, Run], kind: str, prompts: Prompts, answer: int
    ) -> list[list[int]] | None:
        """One turn of somebody. A peer that fails is named and left out from then on."""
        try:
            return runs[kind](prompts, answer)
        except Exception as error:
            if kind == "own":
                raise
            print(f"# {PEERS[kind]} failed here: {type(error).__name__}: {error}", flush=True)
            del runs[kind]
            return None

    def _case(self, case: str, runs: dict[str, Run], prompts: Prompts, turns: int) -> None:
        rates: dict[str, list[float]] = {kind: [] for kind in runs}
        tokens: dict[str, list[list[int]]] = {}
        for turn in range(turns):
            for kind in list(runs):
                began = time.perf_counter()
                made = self._attempt(runs, kind, prompts, self._options.answer)
                if made is None:
                    continue
                seconds = time.perf_counter() - began
                tokens[kind] = made
                rates[kind].append(sum(map(len, made)) / seconds)
                progress(f"{case}: {kind}, turn {turn + 1} of {turns}: {rates[kind][-1]:.1f} tok/s")
        own = statistics.median(rates["own"])
        peers: list[str | None] = [kind for kind in runs if kind != "own"]
        for kind in peers or [None]:
            self._report(case, own, kind, rates, tokens)

    def _report(
        self,
        case: str,
        own: float,
        kind: str | None,
        rates: dict[str, list[float]],
        tokens: dict[str, list[list[int]]],
    ) -> None:
        options = self._options
        peer = None if kind is None else statistics.median(rates[kind])
        pairs = zip(tokens["own"], tokens[kind or "own"], strict=True)
        equal = [a == b for left, right in pairs for a, b in zip(left, right, strict=True)]
        line = {
            "bench": "engine_cpu",
            "case": f"{case}, {options.prompt} + {options.answer} tokens, fp32",
            "value": round(own, 1),
            "unit": "tok/s",
            "peer": None if kind is None else PEERS[kind],
            "peer_value": None if peer is None else round(peer, 1),
            "ratio": None if peer is None else round(own / peer, 2),
            "equal_tokens": None if kind is None else sum(equal) / len(equal),
            "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
            f"{options.threads} threads",
            "load": round(os.getloadavg()[0], 1),
            "commit": self._commit,
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    bench.model(options.model.parent.name, options.model)
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            progress(f"{shape}: making a random model")
            bench.model(shape, random_model(shape, Path(folder)))


if __name__ == "__main__":
    main()
