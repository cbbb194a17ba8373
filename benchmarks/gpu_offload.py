"""Evicted prefixes in host memory, on the GPU at hand: check them, then measure; JSON lines.

Random bf16 weights, so it needs no files. Checked: a block that went to the host and came back has
the same bits, steps in between; a prompt answered from the host has the answer of the same prompt
computed. Measured: GiB/s of copies in pool blocks, host seconds to list and launch them, seconds to
pin, and the first token of a prompt computed, found on the device, and brought back from the host.
"""

import argparse
import time
import traceback
from typing import Any

import gpu_engine
import torch
from gpu_engine import BLOCK, device_seconds, emit, model_config, random_prompts, random_weights

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.gpu_engine import GPULimits, build_runner
from tilefleet_worker.gpu_runner import GPURunner
from tilefleet_worker.host_arena import HostArena
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.kv_cache import KVCache, block_bytes
from tilefleet_worker.pipeline import Pipeline
from tilefleet_worker.request import Request, SamplingParams
from tilefleet_worker.scheduler import Scheduler


def copies(name: str, num_blocks: int) -> None:
    """Bits of blocks that went and came back, and how fast."""
    config = model_config(name)
    size = block_bytes(config, BLOCK, torch.bfloat16)
    cache = KVCache(config, 2 * num_blocks, BLOCK, torch.bfloat16, "cuda")
    began = time.perf_counter()
    arena = HostArena(cache, num_blocks)
    pinned = time.perf_counter() - began
    want = [cache.block(block).normal_().clone() for block in range(num_blocks)]
    out = [Transfer(True, block, block) for block in range(num_blocks)]
    back = [Transfer(False, num_blocks + block, block) for block in range(num_blocks)]
    arena.copy(out)
    for block in range(num_blocks):
        cache.block(block).zero_()  # as the next step would write there
    arena.copy(back)
    equal = all(cache.block(num_blocks + i).equal(want[i]) for i in range(num_blocks))
    seconds = [device_seconds(lambda moved=moved: arena.copy(moved), 5) for moved in (out, back)]
    began = time.perf_counter()
    arena.copy(out)
    launching = time.perf_counter() - began
    torch.cuda.synchronize()
    rates = [round(num_blocks * size / s / 2**30, 1) for s in seconds]
    emit(
        f"copies {name}", equal=equal, block_mib=size / 2**20, to_host_gib_s=rates[0],
        to_device_gib_s=rates[1], launch_us_a_block=round(launching / num_blocks * 1e6, 1),
        pin_seconds_a_gib=round(pinned / (num_blocks * size / 2**30), 3),
    )  # fmt: skip


def ask(scheduler: Scheduler, runner: GPURunner, name: str, prompt: list[int]) -> dict[str, Any]:
    """Serve one request alone: its tokens, seconds to the first, and where its prompt came from."""
    pipeline = Pipeline(runner, scheduler, time.perf_counter)
    params = SamplingParams(max_tokens=16, temperature=0.0)
    if scheduler.add(Request(name, prompt, params, 0.0)) is not None:
        raise RuntimeError("the pool is too small for the prompt")
    began, first, tokens = time.perf_counter(), 0.0, list[int]()
    cached = from_host = 0
    while scheduler.has_work or pipeline.busy:
        for delta in pipeline.turn(time.perf_counter())[0]:
            tokens.extend(delta.token_ids)
            first = first or time.perf_counter() - began
            cached, from_host = delta.num_cached_tokens, delta.num_host_tokens
    scheduler.check_integrity()
    return {
        "tokens": tokens, "ms": round(first * 1e3, 2), "cached": cached, "from_host": from_host
    }  # fmt: skip


def prefixes(name: str, length: int) -> None:
    """A prompt computed, found on the device, evicted by another one, brought back."""
    config, spans = model_config(name), length // BLOCK
    size = block_bytes(config, BLOCK, torch.bfloat16)
    host_blocks = 4 * spans
    with torch.inference_mode():
        weights = random_weights(name, config, 2 * length)
        limits = GPULimits(
            16384, 16, 2 * length, BLOCK, (spans + spans // 2) * size, host_blocks=host_blocks
        )
        runner, cache = build_runner(config, weights, limits)
    runner.warm_up(limits.max_batch_tokens)
    runner.capture()
    pool = BlockPool(cache.num_blocks, BLOCK, token_bytes=size // BLOCK, host_blocks=host_blocks)
    scheduler = Scheduler(pool, 16384, 16, 2 * length, vocab_size=config.vocab_size)
    warm, first, second = random_prompts(3, length, config.vocab_size)
    ask(scheduler, runner, "warm", warm)
    computed = ask(scheduler, runner, "computed", first)
    on_device = ask(scheduler, runner, "on the device", first)
    ask(scheduler, runner, "other", second)
    on_host = ask(scheduler, runner, "on the host", first)
    said = scheduler.gauges().bytes_by_cause
    answers = {"device": on_device, "host": on_host}
    emit(
        f"first token {name} {length}", computed_ms=computed["ms"], device_ms=on_device["ms"],
        host_ms=on_host["ms"], cached=on_host["cached"], from_host=on_host["from_host"],
        same_tokens={key: one["tokens"] == computed["tokens"] for key, one in answers.items()},
        sums=sum(said.by_cause().values()) == said.total
        and sum(said.host_by_cause().values()) == said.host_total,
    )  # fmt: skip


def main() -> None:
    """Each phase is guarded: what fails is a line, too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(gpu_engine.SHAPES))
    parser.add_argument("--length", type=int, default=8192)
    options = parser.parse_args()
    for name in options.models:
        for phase, argument in ((copies, 64), (prefixes, options.length)):
            try:
                phase(name, argument)
            except Exception:
                emit(f"{phase.__name__} {name}", failed=traceback.format_exc()[-800:])
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
