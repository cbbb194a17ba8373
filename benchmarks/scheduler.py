"""Scheduler and prefix hashes, without a device: µs a request and step, and ms a long prompt.

JSON lines. 256 sequences decode with prefix caching, end tokens and answers of two lengths; the
runner is a formula whose time is not counted. The floor of the hashes is the bare SHA-256 over the
same bytes in the same run.
"""

import gc
import hashlib
import json
import os
import statistics
import struct
import subprocess
import time
from array import array

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.prefix_chain import PrefixChain, chain_root
from tilefleet_worker.request import Request, SamplingParams
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.step import StepResult

SEQUENCES, STEPS, PROMPT, VOCAB = 256, 400, 512, 32_000
HASHED_TOKENS, BLOCK = 100_000, 64


def filled() -> Scheduler:
    """A scheduler with all its requests past their prompts."""
    pool = BlockPool(SEQUENCES * 160, 16)
    scheduler = Scheduler(pool, 8192, SEQUENCES, 8192, vocab_size=VOCAB, eos_token_ids=(VOCAB - 1,))
    params = SamplingParams(max_tokens=STEPS * 4, temperature=0.7, top_k=20, stop_token_ids=(5, 6))
    for index in range(SEQUENCES):
        prompt = [(index * 7919 + place * 31) % (VOCAB - 2) for place in range(PROMPT)]
        refusal = scheduler.add(Request(f"request-{index}", prompt, params, 0.0))
        if refusal is not None:
            raise SystemExit(refusal.message)
    while scheduler.gauges().waiting or scheduler.gauges().counts["generated_tokens"] < SEQUENCES:
        step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> tuple[float, float]:
    """One step of a device that takes no time. Returns the seconds of schedule and commit."""
    start = time.perf_counter()
    plan = scheduler.schedule()
    scheduled = time.perf_counter()
    tokens = (plan.ends * 31 % 1000 + 1000).tolist()
    pairs = zip(plan.request_ids, tokens, plan.sample.tolist(), strict=True)
    result = StepResult({request_id: token for request_id, token, sample in pairs if sample})
    computed = time.perf_counter()
    deltas = scheduler.commit(plan, result)
    committed = time.perf_counter()
    del deltas  # behind the clock: whoever reads them lets go of them
    return scheduled - start, committed - computed


def report(case: str, value: float, unit: str, **more: object) -> None:
    """Print one row."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    row = {"bench": "scheduler", "case": case, "value": round(value, 3), "unit": unit, **more}
    load = os.getloadavg()[0]
    print(json.dumps({**row, "load": round(load, 1), "commit": commit.stdout.strip()}), flush=True)


def decode() -> None:
    """All sequences decode; the median step."""
    scheduler = filled()
    gc.collect()
    gc.freeze()  # as a server does after its start
    times = [step(scheduler) for _ in range(STEPS)]
    unit = "us/request/step"
    for name, part in (("schedule", 0), ("commit", 1)):
        seconds = statistics.median(time[part] for time in times)
        report(f"{name} at {SEQUENCES}", seconds / SEQUENCES * 1e6, unit)
    both = statistics.median(sum(time) for time in times) / SEQUENCES * 1e6
    report(f"both at {SEQUENCES}", both, unit, goal=1.0, published={"vLLM": "11 to 14"})


def hashes() -> None:
    """The chain over a long prompt against the SHA-256 calls alone."""
    tokens = array("I", range(1000, 1000 + HASHED_TOKENS))
    root = chain_root("model", "salt")
    blocks = [root + struct.pack(f"<{BLOCK}I", *tokens[:BLOCK])] * (HASHED_TOKENS // BLOCK)
    ours, floor = [], []
    for _ in range(21):
        start = time.perf_counter()
        PrefixChain(root).extend(tokens, BLOCK)
        middle = time.perf_counter()
        for block in blocks:
            hashlib.sha256(block).digest()
        floor.append(time.perf_counter() - middle)
        ours.append(middle - start)
    value, peer = statistics.median(ours) * 1e3, statistics.median(floor) * 1e3
    more = {"peer": "bare SHA-256", "peer_value": round(peer, 3), "ratio": round(value / peer, 2)}
    report(f"prefix hash of {HASHED_TOKENS} tokens at block {BLOCK}", value, "ms", goal=1.2, **more)


if __name__ == "__main__":
    decode()
    hashes()
