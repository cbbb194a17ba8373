"""The engine on the GPU at hand: check it, then measure it; JSON lines, one call.

Random bf16 weights made on the device, so it needs no files and no network. Phases run in order,
each guarded: what fails is a line too, and the rest goes on; each model has a process of its own,
because a fault on the device ends everything in it. Floor of a decode step: every weight
but the input embedding, and the KV of all contexts, over the measured copy rate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilefleet_worker.attention.base import AttentionSpec
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.fused_decoder import FusedLayer, FusedWeights, StepInputs
from tilefleet_worker.fused_weights import rope_table
from tilefleet_worker.gpu_engine import GPULimits, build_runner, prompt_step_tokens
from tilefleet_worker.gpu_runner import GPURunner, probe
from tilefleet_worker.kernels import norm, rotary_store, swiglu
from tilefleet_worker.kernels.rotary_store import Rotation
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.pipeline import Launched, Pipeline
from tilefleet_worker.request import Request, SamplingParams
from tilefleet_worker.request_table import SAMPLER
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.step import StepPlan, StepResult
from tilefleet_worker.step_arrays import StepArrays

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 64
STEP_TOKENS = 16384  # --max-batch-tokens; vLLM's default on this GPU is as many
# hidden, intermediate, layers, heads, KV heads, head dim, vocabulary, tied, norm of q and k
SHAPES = {
    "check": (1024, 2816, 4, 16, 4, 128, 4096, False, True),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True, True),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, False, False),
}
START = time.monotonic()


def emit(case: str, **values: Any) -> None:
    print(json.dumps({"bench": "gpu_engine", "case": case, **values}), flush=True)


def model_config(name: str) -> ModelConfig:
    hidden, inner, layers, heads, kv_heads, dim, vocab, tied, _ = SHAPES[name]
    raw = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": dim, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": tied, "hidden_act": "silu",
    }  # fmt: skip
    return ModelConfig.from_dict(raw, {}, name)


def random_weights(name: str, config: ModelConfig, max_positions: int) -> FusedWeights:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(1)

    def matrix(rows: int, features: int) -> torch.Tensor:
        made = torch.empty(rows, features, dtype=torch.bfloat16, device=device)
        return made.normal_(0.0, features**-0.5, generator=generator)

    def ones(features: int) -> torch.Tensor:
        made = torch.empty(features, dtype=torch.bfloat16, device=device)
        return made.normal_(1.0, 0.1, generator=generator)

    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    table = rope_table(config.ropes[0], config.head_dim, max_positions, device)
    with_norm = SHAPES[name][-1]
    layers = tuple(
        FusedLayer(
            ones(hidden), matrix((heads + 2 * kv_heads) * dim, hidden), None,
            Rotation(
                table, 1e-6, ones(dim) if with_norm else None, ones(dim) if with_norm else None
            ),
            AttentionSpec(dim**-0.5),
            matrix(hidden, heads * dim), None, ones(hidden), matrix(2 * inner, hidden),
            matrix(hidden, inner),
        )
        for _ in range(config.num_layers)
    )  # fmt: skip
    embedding = torch.empty(config.vocab_size, hidden, dtype=torch.bfloat16, device=device)
    embedding.normal_(0.0, 1.0, generator=generator)
    tied = config.tie_word_embeddings
    head = embedding if tied else matrix(config.vocab_size, hidden)
    return FusedWeights(embedding, layers, ones(hidden), head)


def reference_logits(config: ModelConfig, weights: FusedWeights, tokens: list[int]) -> torch.Tensor:
    """Logits fp64 [tokens, vocabulary] from the definition, no cache, no kernel of ours."""
    eps = config.rms_norm_eps

    def normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        return x if weight is None else x * weight.double()

    positions = torch.arange(len(tokens), device="cuda")
    x = weights.embedding[torch.tensor(tokens, device="cuda")].double()
    group = config.num_heads // config.num_kv_heads
    for layer in weights.layers:
        qkv = normed(x, layer.input_norm) @ layer.qkv.double().t()
        qkv = qkv.view(len(tokens), -1, config.head_dim)
        queries, keys, values = qkv.split(
            [config.num_heads, config.num_kv_heads, config.num_kv_heads], 1
        )
        q = rotary_store.rotary_reference(queries, positions, layer.rotation, layer.rotation.q_norm)
        k = rotary_store.rotary_reference(keys, positions, layer.rotation, layer.rotation.k_norm)
        k, v = k.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5
        scores.masked_fill_(positions[None, :] > positions[:, None], -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + attended @ layer.output.double().t()
        gate_up = normed(x, layer.mlp_norm) @ layer.gate_up.double().t()
        x = x + swiglu.swiglu_reference(gate_up) @ layer.down.double().t()
    return normed(x, weights.final_norm) @ weights.head.double().t()


class Setup:
    """One model on the device with its runner, warmed up."""

    batch_invariant = True

    def __init__(self, name: str, max_context: int = 16384, max_rows: int = 256) -> None:
        began = time.monotonic()
        self.name, self.config = name, model_config(name)
        with torch.inference_mode():
            self.weights = random_weights(name, self.config, max_context)
            torch.cuda.synchronize()
            seconds = {"weights": time.monotonic() - began}
            limits = GPULimits(
                STEP_TOKENS, max_rows, max_context, BLOCK, batch_invariant=self.batch_invariant
            )
            self.runner, self.cache = build_runner(self.config, self.weights, limits)
            seconds["pool"] = time.monotonic() - began
        self.runner.warm_up(limits.max_batch_tokens)
        self.runner.capture()
        torch.cuda.synchronize()
        seconds["ready"] = time.monotonic() - began
        self.max_context = max_context
        graphs = self.runner._graphs
        emit(
            f"start {name}", seconds={k: round(v, 2) for k, v in seconds.items()},
            kv_tokens=self.cache.num_blocks * BLOCK, captures=len(graphs.sizes) if graphs else 0,
            graph_mib=round((graphs.memory_bytes if graphs else 0) / 2**20),
            allocated_gib=round(torch.cuda.memory_allocated() / 2**30, 2),
        )  # fmt: skip

    def scheduler(self, prompts: list[list[int]], answer: int, **kind: Any) -> Scheduler:
        """A scheduler over the pool with one request a prompt, greedy unless `kind` says else."""
        pool = BlockPool(self.cache.num_blocks, BLOCK, prefix_caching=False)
        scheduler = Scheduler(
            pool, STEP_TOKENS, 256, self.max_context, vocab_size=self.config.vocab_size,
            prompt_tokens=prompt_step_tokens(self.config),
        )  # fmt: skip
        params = SamplingParams(**{"max_tokens": answer, "temperature": 0.0, **kind})
        for index, prompt in enumerate(prompts):
            refusal = scheduler.add(Request(f"r{index}", prompt, params, 0.0))
            if refusal is not None:
                raise RuntimeError(refusal.message)
        return scheduler

    def step_bytes(self, batch: int, context: int) -> int:
        """Bytes a decode step must read: weights but the input embedding, and the KV."""
        config, item = self.config, 2
        per_layer = sum(
            x.numel() for x in (
                self.weights.layers[0].qkv, self.weights.layers[0].output,
                self.weights.layers[0].gate_up, self.weights.layers[0].down,
            )
        )  # fmt: skip
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * batch * context
        return item * (per_layer * config.num_layers + self.weights.head.numel() + kv)


def random_prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count * 7919 + length)
    return torch.randint(0, vocab, (count, length), generator=generator).tolist()


def copy_rate() -> float:
    """Bytes per second, read plus written."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / device_seconds(lambda: b.copy_(a), 10)


def device_seconds(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call on the device."""
    call()
    spans = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in spans) / 1e3


# Phases -----------------------------------------------------------------------------------------


def check_kernels() -> None:
    device, dtype = "cuda", torch.bfloat16
    residual = torch.randn(37, 1024, device=device)
    delta = torch.randn(37, 1024, device=device).to(dtype)
    weight = torch.randn(1024, device=device).to(dtype)
    new, want = norm.add_rms_norm_reference(residual, delta, weight, 1e-6)
    got = norm.add_rms_norm(residual, delta, weight, torch.empty_like(delta), 1e-6)
    gate_up = torch.randn(37, 2 * 2816, device=device).to(dtype)
    act = swiglu.swiglu(gate_up, torch.empty(37, 2816, dtype=dtype, device=device))
    table = rope_table(model_config("check").ropes[0], 128, 512, torch.device(device))
    rotation = Rotation(table, 1e-6, weight[:128], weight[128:256])
    qkv = torch.randn(37, 24, 128, device=device).to(dtype)
    positions = torch.randint(0, 512, (37,), device=device).int()
    slots = torch.randperm(4 * BLOCK, device=device)[:37].int()
    cache = torch.zeros(2, 4, BLOCK, 4, 128, dtype=dtype, device=device)
    query = torch.empty(37, 16, 128, dtype=dtype, device=device)
    rotary_store.rotary_store(qkv.view(37, -1), positions, slots, rotation, query, cache)
    stored = cache.view(2, -1, 4, 128)[:, slots.long()]
    emit(
        "check fused kernels",
        norm=relative(got, want), residual=relative(residual, new),
        swiglu=relative(act, swiglu.swiglu_reference(gate_up)),
        query=relative(
            query, rotary_store.rotary_reference(qkv[:, :16], positions, rotation, rotation.q_norm)
        ),
        key=relative(
            stored[0],
            rotary_store.rotary_reference(qkv[:, 16:20], positions, rotation, rotation.k_norm),
        ),
        value_exact=bool(stored[1].equal(qkv[:, 20:])), bound=2**-8,
    )  # fmt: skip


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over the larger of 1 and the value."""
    error = (got.double() - want.double()).abs() / want.double().abs().clamp_min(1.0)
    return float(f"{error.max().item():.3g}")


def check_attention() -> None:
    script = ROOT / "tests" / "worker" / "triton_attention_cases.py"
    for kind in ("decode", "prefill", "invariance"):
        run = subprocess.run(
            [sys.executable, str(script), kind], capture_output=True, text=True, timeout=90,
            env={**os.environ, "PYTHONPATH": f"{ROOT}/worker:{os.environ.get('PYTHONPATH', '')}"},
        )  # fmt: skip
        emit(
            f"check attention {kind}", ok=run.returncode == 0, said=(run.stdout + run.stderr)[-300:]
        )


def check_tokens(setup: Setup) -> None:
    """Greedy tokens against fp64 logits of the same weights, chunks and decodes mixed."""
    prompts = [random_prompts(1, n, setup.config.vocab_size)[0] for n in (1, 70, 300, 513)]
    scheduler = setup.scheduler(prompts, 32)
    scheduler.max_batch_tokens = 200  # chunks
    tokens = answers(scheduler, setup.runner)
    equal = total = 0
    worst = 0.0  # by how much the chosen token's true logit lies below the best, in deviations
    for index, prompt in enumerate(prompts):
        answer = tokens[f"r{index}"]
        logits = reference_logits(setup.config, setup.weights, prompt + answer[:-1])
        logits = logits[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0]
        gaps = (logits.max(-1).values - chosen) / logits.std(-1)
        equal += int((gaps == 0).sum())
        total += len(answer)
        worst = max(worst, gaps.max().item())
    emit("check greedy tokens", equal=equal, of=total, worst_gap_std=round(worst, 5), bound=0.05)


class OneAtATime:
    """The runner without its launches: the host waits for every step."""

    def __init__(self, runner: GPURunner) -> None:
        self.run, self.check = runner.run, runner.check


class Watched:
    """The runner, and how long the host waited for it."""

    def __init__(self, runner: GPURunner) -> None:
        self._runner = runner
        self.run, self.check = runner.run, runner.check
        self.waited_seconds = 0.0

    def launch(self, plan: StepPlan) -> Launched:
        """As the runner."""
        return WatchedStep(self, self._runner.launch(plan))


class WatchedStep:
    """A step whose wait is measured."""

    def __init__(self, watched: Watched, step: Launched) -> None:
        self._watched, self._step = watched, step

    def result(self) -> StepResult:
        """As the step."""
        began = time.perf_counter()
        result = self._step.result()
        self._watched.waited_seconds += time.perf_counter() - began
        return result


def answers(scheduler: Scheduler, runner: Any) -> dict[str, list[int]]:
    """Tokens of all requests of a scheduler."""
    pipeline = Pipeline(runner, scheduler, time.perf_counter)
    tokens: dict[str, list[int]] = {}
    while scheduler.has_work or pipeline.busy:
        for delta in pipeline.turn(time.perf_counter())[0]:
            if delta.error is not None:
                raise RuntimeError(delta.error)
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens


def check_ahead(setup: Setup) -> None:
    """Tokens one step ahead, one at a time, and chosen by the host from the same logits.

    min_tokens makes the host choose, and bans nothing where no end token is known. Eight rows: a
    row's logits have the same bits in batches of up to sixteen.
    """
    prompts = [random_prompts(1, n, setup.config.vocab_size)[0] for n in range(20, 180, 20)]
    for kind in (
        {}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
        {"temperature": 0.3, "min_p": 0.05}, {"temperature": 1.0, "top_p": 0.9},
    ):  # fmt: skip
        found = [
            answers(setup.scheduler(prompts, 48, **kind), setup.runner),
            answers(setup.scheduler(prompts, 48, **kind), OneAtATime(setup.runner)),
            answers(setup.scheduler(prompts, 48, **kind, min_tokens=1), setup.runner),
        ]
        emit(
            f"check ahead {setup.name}", kind=kind, ahead_equals_one_at_a_time=found[0] == found[1],
            device_equals_host=found[0] == found[2],
            tokens=sum(len(answer) for answer in found[0].values()),
            different=len({t for answer in found[0].values() for t in answer}),
        )  # fmt: skip


def check_sampling() -> None:
    script = ROOT / "tests" / "worker" / "sampling_cases.py"
    run = subprocess.run(
        [sys.executable, str(script), "4", "cuda"], capture_output=True, text=True, timeout=90,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/worker:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    emit("check sampling", ok=run.returncode == 0, said=(run.stdout + run.stderr)[-600:])


def check_invariance(setup: Setup) -> None:
    """One request's decode logits, bit by bit, at batch 1 … 256."""
    context = 130
    prompts = random_prompts(256, context, setup.config.vocab_size)
    blocks = -(-context // BLOCK)
    tables = [tuple(range(i * blocks, (i + 1) * blocks)) for i in range(256)]
    for prompt, table in zip(prompts, tables, strict=True):
        setup.runner.logits(StepPlan.of((probe(0, tuple(prompt[:-1]), table),)))
    rows = [
        probe(context - 1, (prompt[-1],), table)
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    alone = torch.cat([setup.runner.logits(StepPlan.of((row,))).clone() for row in rows[:8]])
    same = {}
    for batch in (2, 3, 4, 8, 16, 17, 32, 64, 100, 128, 256):
        logits = setup.runner.logits(StepPlan.of(rows[:batch]))
        count = min(batch, 8)
        same[batch] = bool(logits[:count].equal(alone[:count]))
    emit(f"check batch invariance {setup.name}", bitwise_equal=same)


def check_launches(setup: Setup) -> None:
    from torch.profiler import ProfilerActivity, profile

    runner = setup.runner
    with torch.inference_mode():
        for batch in (1, 64):
            inputs: StepInputs = runner._inputs.decode(None, batch)
            runner._forward(inputs)
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
                runner._forward(inputs)
                torch.cuda.synchronize()
            kernels = [e for e in trace.events() if e.device_type.name == "CUDA"]
            by_name: dict[str, list[float]] = {}
            for event in kernels:
                by_name.setdefault(event.name[:60], []).append(event.device_time)
            top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:14]
            emit(
                f"launches {setup.name} batch {batch}", a_step=len(kernels),
                a_layer=round(len(kernels) / setup.config.num_layers, 2),
                kernels={k: [len(v), round(statistics.median(v), 1)] for k, v in top},
            )  # fmt: skip


def measure_products(setup: Setup, rate: float) -> None:
    """The library's matrix products at decode sizes: share of the copy rate."""
    layer = setup.weights.layers
    maps = {"qkv": "qkv", "output": "output", "gate_up": "gate_up", "down": "down"}
    for batch in (1, 8, 64, 256):
        row = {}
        for name, field in maps.items():
            matrices = [getattr(one, field) for one in layer[:16]]  # more than the L2 holds
            x = torch.randn(batch, matrices[0].shape[1], device="cuda").bfloat16()
            out = torch.empty(batch, matrices[0].shape[0], dtype=torch.bfloat16, device="cuda")

            def products(x=x, out=out, matrices=matrices) -> None:  # type: ignore[no-untyped-def]
                for matrix in matrices:
                    torch.mm(x, matrix.t(), out=out)

            graph = torch.cuda.CUDAGraph()
            products()
            with torch.cuda.graph(graph):
                products()
            seconds = device_seconds(graph.replay, 5) / len(matrices)
            row[name] = [
                round(seconds * 1e6, 1), round(matrices[0].numel() * 2 / rate / seconds, 3)
            ]  # fmt: skip
        emit(f"products {setup.name} batch {batch}", us_and_share=row)


def replay_seconds(setup: Setup, batch: int, context: int, kind: dict[str, Any]) -> float:
    """Seconds of a captured decode step on the device alone, over contexts of this length."""
    graphs, size = setup.runner._graphs, setup.runner._cache.block_size
    if graphs is None:
        return 0.0
    width = -(-context // size)
    table = np.arange(batch * width).reshape(batch, width) % setup.runner._cache.num_blocks
    ones = np.ones(batch, np.int64)
    drawn = np.zeros(batch, SAMPLER)
    drawn["logits_row"] = np.arange(batch)
    for name, value in {"top_p": 1.0, **kind}.items():
        drawn[name] = value
    arrays = StepArrays(
        order=None, num_decodes=batch, token_ids=ones, positions=ones * (context - 1),
        slots=-ones, context_lens=ones * context, lengths=ones, block_table=table,
        logits_index=None, samples=drawn, sampled=np.arange(batch),
    )  # fmt: skip
    padded = graphs.padded(batch)
    with torch.inference_mode():
        setup.runner._inputs.decode(arrays, padded)
    return device_seconds(graphs._graphs[padded][0].replay, 10)


def measure_load(
    setup: Setup, batch: int, rate: float, kind: dict[str, Any], length: int = 1024, out: int = 256
) -> None:
    """All requests at once. The loop is the engine's pipeline, without server or text.

    Host gap: what a step takes beyond the graph alone.
    """
    for repeat in range(2):  # the first warms up
        answer = 8 if repeat == 0 else out
        prompts = random_prompts(batch, length, setup.config.vocab_size)
        scheduler = setup.scheduler(prompts, answer, **kind)
        runner = Watched(setup.runner)
        pipeline = Pipeline(runner, scheduler, time.perf_counter)
        first: dict[str, float] = {}
        full_steps: list[float] = []
        waits: list[float] = []
        began = time.perf_counter()
        count = 0
        while scheduler.has_work or pipeline.busy:
            runner.waited_seconds = 0.0
            deltas, steps = pipeline.turn(time.perf_counter())
            for plan, seconds in steps:
                if len(plan) == plan.num_tokens == batch:
                    full_steps.append(seconds)
                    waits.append(runner.waited_seconds)
            now = time.perf_counter() - began
            for delta in deltas:
                count += len(delta.token_ids)
                first.setdefault(delta.request_id, now)
        total = time.perf_counter() - began
    floor = setup.step_bytes(batch, length + out // 2) / rate
    step = statistics.mean(full_steps)
    device = replay_seconds(setup, batch, length + out // 2, kind)
    times = sorted(first.values())
    emit(
        f"load {setup.name} batch {batch} in {length} out {out}", kind=kind,
        step_ms=round(step * 1e3, 3), step_median_ms=round(statistics.median(full_steps) * 1e3, 3),
        replay_ms=round(device * 1e3, 3), host_gap_ms=round((step - device) * 1e3, 3),
        host_busy_ms=round((step - statistics.mean(waits)) * 1e3, 3),
        floor_ms=round(floor * 1e3, 3),
        floor_share=round(floor / step, 3), decode_tok_s=round(batch / step, 1),
        output_tok_s=round(count / total, 1), ttft_mean_s=round(statistics.mean(times), 4),
        ttft_p99_s=round(times[int(len(times) * 0.99)], 4), total_s=round(total, 3),
    )  # fmt: skip


def measure_prefill(setup: Setup, batch: int, length: int) -> None:
    spans = []
    for _ in range(3):
        scheduler = setup.scheduler(random_prompts(batch, length, setup.config.vocab_size), 1)
        began = time.perf_counter()
        while scheduler.has_work:
            plan = scheduler.schedule()
            scheduler.commit(plan, setup.runner.run(plan))
        spans.append(time.perf_counter() - began)
    seconds = statistics.median(spans)
    emit(
        f"prefill {setup.name} {batch}x{length}", seconds=round(seconds, 4),
        tok_s=round(batch * length / seconds),
    )  # fmt: skip


class Phases:
    """Runs what fits the budget; a failure is a line."""

    def __init__(self, budget_seconds: float) -> None:
        self._end = START + budget_seconds

    def run(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        """What `call` returns, or None when it failed or the budget is spent."""
        if time.monotonic() > self._end:
            emit(name, skipped="budget")
            return None
        began = time.monotonic()
        try:
            result = call(*args)
        except Exception as error:
            emit(name, error=f"{type(error).__name__}: {error}"[:400])
            traceback.print_exc()
            if isinstance(error, torch.AcceleratorError):
                raise SystemExit(3) from error  # nothing works after it in this process
            return None
        print(f"# {name}: {time.monotonic() - began:.1f} s", flush=True)
        return result


def check_phases(phases: Phases, rate: float) -> None:
    del rate
    phases.run("check fused kernels", check_kernels)
    setup = phases.run("start check", Setup, "check")
    if setup is not None:
        phases.run("check greedy tokens", check_tokens, setup)
        phases.run("check ahead", check_ahead, setup)
        phases.run("check batch invariance", check_invariance, setup)


def model_phases(name: str, batches: str, phases: Phases, rate: float, loads_only: bool) -> None:
    setup = phases.run(f"start {name}", Setup, name)
    if setup is None:
        return
    for batch in map(int, batches.split(",")):
        phases.run(f"load {name} {batch}", measure_load, setup, batch, rate, {})
    for kind in ({"temperature": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.95}):
        phases.run(f"sampled load {name} 64", measure_load, setup, 64, rate, kind)
    if loads_only:
        return
    phases.run(f"prefill {name} 8192", measure_prefill, setup, 1, 8192)
    phases.run(f"launches {name}", check_launches, setup)
    phases.run(f"products {name}", measure_products, setup, rate)
    phases.run(f"invariance {name}", check_invariance, setup)


def in_child(part: str, args: argparse.Namespace, rate: float) -> None:
    """Run one part in a process of its own: a fault on the device ends that process's context."""
    left = args.budget_seconds - (time.monotonic() - START)
    if left <= 0:
        emit(part, skipped="budget")
        return
    command = [
        sys.executable, str(Path(__file__).resolve()), "--part", part, "--rate", str(rate),
        "--batches", args.batches, "--budget-seconds", str(left),
        *(["--loads-only"] if args.loads_only else []),
        *(["--no-batch-invariance"] if args.no_batch_invariance else []),
    ]  # fmt: skip
    try:
        code = subprocess.run(command, timeout=left + 30).returncode
    except subprocess.TimeoutExpired:
        code = -1
    if code:
        emit(part, error=f"the process of this part ended with status {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-seconds", type=float, default=140)
    parser.add_argument("--models", default="llama-3.1-8b,qwen3-0.6b")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--no-batch-invariance", action="store_true", help="as of serve")
    parser.add_argument("--loads-only", action="store_true", help="of the models' phases")
    parser.add_argument("--part", default="", help="check, or one model; used for child processes")
    parser.add_argument("--rate", type=float, default=0.0, help="copy rate in bytes/s, for --part")
    args = parser.parse_args()
    Setup.batch_invariant = not args.no_batch_invariance
    if not torch.cuda.is_available():
        print("gpu_engine: no GPU here, nothing measured", file=sys.stderr)
        return
    if args.part:
        phases = Phases(args.budget_seconds)
        if args.part == "check":
            check_phases(phases, args.rate)
        else:
            model_phases(args.part, args.batches, phases, args.rate, args.loads_only)
        return
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    rate = copy_rate()
    torch.cuda.empty_cache()
    emit(
        "device", device=torch.cuda.get_device_name(), torch=torch.__version__,
        triton=triton.__version__, commit=commit.stdout.strip(), copy_gb_s=round(rate / 1e9),
    )  # fmt: skip
    parts = [] if args.skip_checks else ["check"]
    for part in [*parts, *args.models.split(",")]:
        in_child(part, args, rate)
    if not args.skip_checks:
        phases = Phases(args.budget_seconds)
        phases.run("check sampling", check_sampling)
        phases.run("check attention", check_attention)


if __name__ == "__main__":
    main()
