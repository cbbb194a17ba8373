"""Fused kernels and the GPU's runner against their references, in Triton's interpreter, fp32.

python fused_kernel_cases.py kernels|runner|windowed|engine|ahead. Needs TRITON_INTERPRET=1.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tilefleet_worker import attention, fused_weights, models
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.factory import build_engine
from tilefleet_worker.gpu_engine import GPULimits, build_runner
from tilefleet_worker.kernels.norm import add_rms_norm, add_rms_norm_reference
from tilefleet_worker.kernels.rotary_store import (
    Rotation,
    rotary_reference,
    rotary_store,
    rotary_table,
)
from tilefleet_worker.kernels.swiglu import swiglu, swiglu_reference
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.pipeline import Pipeline
from tilefleet_worker.request import Request, SamplingParams
from tilefleet_worker.runner import Runner
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.weights import Weights

CPU = torch.device("cpu")


def near(got, want, name):
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=2e-5, msg=name)


def norms():
    for rows, features, scale in ((3, 96, 1.0), (1, 1000, 1e-4), (2, 64, 1e3)):
        residual, delta = torch.randn(2, rows, features) * scale
        weight = torch.randn(features)
        for change in (delta, None):
            new, want = add_rms_norm_reference(residual, change, weight, 1e-6)
            mine = residual.clone()
            near(add_rms_norm(mine, change, weight, torch.empty_like(mine), 1e-6), want, "norm")
            near(mine / scale, new / scale, "residual")


def gates():
    for rows, inner in ((1, 7), (3, 1500)):
        gate_up = torch.randn(rows, 2 * inner) * 4
        near(swiglu(gate_up, torch.empty(rows, inner)), swiglu_reference(gate_up), "swiglu")


def rotations():
    """Head sizes with and without dimensions that are not rotated; slots in any order; padding."""
    for dim, rotated, with_norm in ((64, 64, True), (80, 80, False), (96, 24, True)):
        heads, kv_heads, block, tokens = 3, 1, 4, 5
        table = rotary_table(10000.0 ** -torch.linspace(0, 0.9, rotated // 2).double(), 50)
        norms_ = (torch.randn(dim), torch.randn(dim)) if with_norm else (None, None)
        rotation = Rotation(table, 1e-6, *norms_)
        qkv = torch.randn(tokens, heads + 2 * kv_heads, dim)
        positions = torch.tensor([0, 7, 49, 3, 11], dtype=torch.int32)
        slots = torch.tensor([11, 0, 5, -1, 2], dtype=torch.int32)
        cache = torch.full((2, 3, block, kv_heads, dim), torch.nan)
        query = torch.empty(tokens, heads, dim)
        rotary_store(qkv.view(tokens, -1), positions, slots, rotation, query, cache)
        near(query, rotary_reference(qkv[:, :heads], positions, rotation, norms_[0]), "query")
        keys = rotary_reference(qkv[:, heads : heads + kv_heads], positions, rotation, norms_[1])
        flat = cache.view(2, -1, kv_heads, dim)
        real = slots >= 0
        near(flat[0, slots[real].long()], keys[real], "key")
        if not flat[1, slots[real].long()].equal(qkv[real, heads + kv_heads :]):
            sys.exit("values are not stored as they are")
        if flat.isnan().all(-1).all(-1).sum() != 2 * (3 * block - 4):
            sys.exit("something was stored where nothing belongs")


def generate(runner, blocks, config, budget):
    pool = BlockPool(blocks, 16, prefix_caching=False)
    scheduler = Scheduler(pool, budget, 4, 512, vocab_size=config.vocab_size)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    tokens = {}
    for name, length in (("a", 1), ("b", 9), ("c", 19)):
        tokens[name] = []
        prompt = [(7 * i + length) % config.vocab_size for i in range(length)]
        scheduler.add(Request(name, prompt, params, 0.0))
    while scheduler.has_work:
        plan = scheduler.schedule()
        for delta in scheduler.commit(plan, runner.run(plan)):
            if delta.error is not None:
                sys.exit(delta.error)
            tokens[delta.request_id] += delta.token_ids
    return tokens


MISTRAL = {
    "architectures": ["MistralForCausalLM"], "vocab_size": 96, "intermediate_size": 80,
    "tie_word_embeddings": True, "sliding_window": 12,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128
    },
}  # fmt: skip
# Two chunks of the vocabulary, two strips of a gated product, two splits of an inner dimension.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 2200, "intermediate_size": 520,
    "tie_word_embeddings": False,
}  # fmt: skip


def random_model(folder, family, layers):
    config = {
        "hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, **family,
    }  # fmt: skip
    vocab, inner = config["vocab_size"], config["intermediate_size"]
    torch.manual_seed(2)
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocab, 64), "model.norm.weight": torch.ones(64)
    }  # fmt: skip
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = torch.randn(vocab, 64)
    shapes = {
        "self_attn.q_proj": (128, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64),
        "self_attn.o_proj": (64, 128), "mlp.gate_proj": (inner, 64), "mlp.up_proj": (inner, 64),
        "mlp.down_proj": (64, inner),
    }  # fmt: skip
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family is QWEN3:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in norms:
            tensors[f"{prefix}.{name}.weight"] = torch.rand(64) + 0.5
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = torch.randn(shape) * 0.15
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def windowed_model(folder, layers=2):
    """A random Mistral with a window shorter than the prompts, and yarn."""
    random_model(folder, MISTRAL, layers)


def runner():
    """A random Qwen3: chunks, mixed steps and decodes give the cpu backend's tokens."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), QWEN3, layers=1)
        compare(Path(folder))


def windowed():
    """Likewise with a sliding window, yarn, and a second layer."""
    with tempfile.TemporaryDirectory() as folder:
        windowed_model(Path(folder))
        compare(Path(folder))


def compare(folder):
    torch.set_num_threads(1)
    config = ModelConfig.from_folder(folder)
    with torch.inference_mode(), Weights(folder) as weights:
        model = models.load(config, weights, 512)
    with torch.inference_mode(), Weights(folder) as weights:
        fused = fused_weights.load(config, weights, 512, torch.float32, CPU)
    limits = GPULimits(32, 4, 512, 16, kv_cache_bytes=2**21)
    mine, cache = build_runner(config, fused, limits)
    plain = Runner(model, KVCache(config, cache.num_blocks, 16), attention.create("cpu", config))
    mine.check()
    want = generate(plain, cache.num_blocks, config, 16)
    got = generate(mine, cache.num_blocks, config, 16)
    if got != want:
        sys.exit(f"{config.architecture}: tokens {got}, expected {want}")


class Failing:
    """The runner, but some of its launches fail: at once, or when their result is wanted."""

    def __init__(self, runner, at_launch, at_result):
        self.run, self.check, self._runner = runner.run, runner.check, runner
        self._at_launch, self._at_result, self._count = at_launch, at_result, 0

    def launch(self, plan):
        self._count += 1
        if self._count == self._at_launch:
            raise MemoryError("no room for the inputs")
        step = self._runner.launch(plan)
        if self._count == self._at_result:
            object.__setattr__(step, "tokens", None)  # as if they had not arrived
        return step


class OneAtATime:
    def __init__(self, runner):
        self.run, self.check = runner.run, runner.check


def answers_to_load(runner, blocks, config, **more):
    """Requests with a shared prefix: greedy, drawn, cut, and one that the host must choose for."""
    scheduler = Scheduler(
        BlockPool(blocks, 16), 40, 4, 64, vocab_size=config.vocab_size, eos_token_ids=(7,)
    )
    prompt = [(7 * i + 3) % config.vocab_size for i in range(20)]
    kinds = (
        {"temperature": 0.0}, {"seed": 2, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.0, "logprobs": 1},
    )  # fmt: skip
    tokens = {f"r{i}": [] for i in range(len(kinds))}
    for i, kind in enumerate(kinds):
        params = SamplingParams(max_tokens=3 + i % 2, **{**kind, **more})
        scheduler.add(Request(f"r{i}", prompt[: 14 + 2 * i], params, 0.0))
    pipeline = Pipeline(runner, scheduler, time.monotonic)
    while scheduler.has_work or pipeline.busy:
        for delta in pipeline.turn(0.0)[0]:
            if delta.error is not None:
                sys.exit(delta.error)
            tokens[delta.request_id] += delta.token_ids
        scheduler.check_integrity()
    return tokens


def ahead():
    """One step ahead, two of the steps failing: what the host chooses one step at a time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        windowed_model(Path(folder))
        config = ModelConfig.from_folder(Path(folder))
        with torch.inference_mode(), Weights(Path(folder)) as weights:
            fused = fused_weights.load(config, weights, 64, torch.float32, CPU)
    mine, cache = build_runner(config, fused, GPULimits(40, 4, 64, 16, kv_cache_bytes=2**18))
    want = answers_to_load(OneAtATime(mine), cache.num_blocks, config, min_tokens=1)
    got = answers_to_load(Failing(mine, 4, 2), cache.num_blocks, config)
    if got != want:
        sys.exit(f"tokens {got}, expected {want}")


def engine():
    """Backend triton by the factory: the tokens of backend cpu, and what /stats shows."""
    with tempfile.TemporaryDirectory() as folder:
        windowed_model(Path(folder))
        answers, _ = answers_of(folder, "cpu")
        mine, info = answers_of(folder, "triton")
    if answers != mine or sorted(map(len, mine.values())) != [2, 2]:
        sys.exit(f"tokens {mine}, expected {answers}")
    phases = [name for name, _ in info.startup]
    if phases != ["weights", "pool", "warmup", "capture"]:
        sys.exit(f"phases are {phases}")
    shown = {name: info.config[name] for name in ("backend", "dtype", "kv_cache_bytes")}
    if shown != {"backend": "triton", "dtype": "float32", "kv_cache_bytes": 2**18}:
        sys.exit(f"/stats shows {shown}")


def answers_of(folder, backend):
    """Tokens of two requests by id, and the engine's info."""
    options = EngineConfig(
        backend=backend, dtype="float32", kv_cache_bytes=2**18, max_batch_tokens=8,
        max_concurrent=2, max_model_len=64, block_size=8, threads=1,
    )  # fmt: skip
    built = build_engine(Path(folder), options)
    tokens = {"a": [], "b": []}
    ended = threading.Semaphore(0)

    def sink(deltas):
        for delta in deltas:
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                ended.release()

    built.set_sink(sink)
    built.start()
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    for name, length in (("a", 1), ("b", 11)):
        built.submit(Request(name, tuple(range(5, 5 + length)), params, 0.0))
    for _ in tokens:
        if not ended.acquire(timeout=200):
            sys.exit(f"{backend}: no answer")
    built.stop()
    return tokens, built.info


if __name__ == "__main__":
    if sys.argv[1] == "kernels":
        torch.manual_seed(0)
        norms()
        gates()
        rotations()
    elif sys.argv[1] == "windowed":
        windowed()
    elif sys.argv[1] == "engine":
        engine()
    elif sys.argv[1] == "ahead":
        ahead()
    else:
        runner()
    print("checked")
