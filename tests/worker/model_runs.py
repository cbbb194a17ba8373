"""Runs prompts through the whole engine core on a CPU and records the logits of every token."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from tilefleet_worker import attention, models
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.cpu_engine import CPUParts
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.layer_kinds import CacheLayout
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.request import Request, SamplingParams
from tilefleet_worker.runner import Runner
from tilefleet_worker.sampler import sample
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.step import StepPlan, StepResult
from tilefleet_worker.weights import Weights

# Equal bits were measured on AVX2. Elsewhere tokens must be equal, and the engine's own probe says
# at start whether bits are.
BITS_PROMISED = torch.backends.cpu.get_cpu_capability() == "AVX2"

Logits = dict[tuple[str, int], torch.Tensor]
"""Of each sampled token: (request id, its position) → [vocabulary]."""


@lru_cache
def load(folder: Path) -> tuple[ModelConfig, models.Model]:
    """The model of a folder, in fp32."""
    config = ModelConfig.from_folder(folder)
    with torch.inference_mode(), Weights(folder) as weights:
        return config, models.load(config, weights, config.max_positions)


class Recorder:
    """A runner that remembers the logits of each sampled token."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.logits: Logits = {}
        self.largest_batch = 0

    def run(self, plan: StepPlan) -> StepResult:
        rows = [row for row in plan.rows if row.num_logits]
        self.largest_batch = max(self.largest_batch, len(plan.rows))
        if not rows:
            return self.runner.run(plan)
        step_logits = self.runner.logits(plan)
        result, first = sample(step_logits, rows), 0
        for row in rows:
            assert not row.targets
            for ahead in range(1 + len(result.accepted.get(row.request_id, ()))):
                self.logits[row.request_id, row.end + ahead] = step_logits[first + ahead].clone()
            first += row.num_logits
        return result


@dataclass(frozen=True)
class Run:
    """How to run: defaults are one large step after the other."""

    blocks: int = 1024
    host_blocks: int = 0
    block_size: int = 16
    budget: int = 2048
    concurrent: int = 64
    caching: bool = False
    backend: str = "cpu"
    rounds: int = 1
    drafts: int = 0
    params: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_tokens=64, temperature=0.0)
    )
    after_step: Callable[[Scheduler], None] = Scheduler.check_integrity


@dataclass(frozen=True)
class Made:
    """What a run made. Tokens are those of the last round."""

    tokens: dict[str, list[int]]
    logits: Logits
    largest_batch: int
    counts: dict[str, int]

    def differing(self, expected: Logits) -> list[tuple[str, int]]:
        """Keys of recorded logits that differ in any bit, where bits are promised."""
        different = [k for k, made in self.logits.items() if not made.equal(expected[k])]
        return different if BITS_PROMISED else []


def generate(
    folder: Path, prompts: dict[str, list[int]], run: Run, parts: CPUParts | None = None
) -> Made:
    """Run prompts together. With more rounds the later ones can hit the cache.

    parts: what computes instead of the whole model: the first of several ranks.
    """
    if parts is None:
        config, model = load(folder)
        layout = CacheLayout.of(config.windows, config.max_positions)
        cache = KVCache(config, run.blocks, run.block_size, layout=layout)
        backend = attention.create(run.backend, config)
        runner = Recorder(Runner(model, cache, backend, run.host_blocks))
    else:
        config, layout = ModelConfig.from_folder(folder), parts.cache.layout
        assert parts.cache.num_blocks >= run.blocks
        runner = Recorder(Runner(parts.model, parts.cache, parts.attention))
    pool = BlockPool(
        run.blocks, run.block_size, kinds=layout.kinds, prefix_caching=run.caching,
        host_blocks=run.host_blocks,
    )  # fmt: skip
    scheduler = Scheduler(
        pool, run.budget, run.concurrent, config.max_positions, vocab_size=config.vocab_size,
        max_drafts=run.drafts,
    )  # fmt: skip
    tokens: dict[str, list[int]] = {}
    brought_back = 0
    for _ in range(run.rounds):
        tokens = {name: [] for name in prompts}
        for name, prompt in prompts.items():
            assert scheduler.add(Request(name, prompt, run.params, 0.0)) is None
        while scheduler.has_work:
            plan = scheduler.schedule()
            runner.runner.transfer(transfers := scheduler.take_transfers())
            brought_back += sum(not transfer.to_host for transfer in transfers)
            for delta in scheduler.commit(plan, runner.run(plan)):
                assert delta.error is None
                tokens[delta.request_id].extend(delta.token_ids)
            run.after_step(scheduler)
    counts = dict(scheduler.gauges().counts)
    counts["blocks_brought_back"] = brought_back
    return Made(tokens, runner.logits, runner.largest_batch, counts)


def alone(
    folder: Path, prompts: dict[str, list[int]], run: Run, parts: CPUParts | None = None
) -> Made:
    """Every prompt by itself: the yardstick of all other runs."""
    tokens: dict[str, list[int]] = {}
    logits: Logits = {}
    for name, prompt in prompts.items():
        made = generate(folder, {name: prompt}, run, parts)
        tokens.update(made.tokens)
        logits.update(made.logits)
    return Made(tokens, logits, 1, {})
