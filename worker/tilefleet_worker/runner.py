"""The runner: the only part that knows the device. A plan goes in, tokens come out."""

from collections.abc import Iterable, Sequence

import torch

from tilefleet_worker.attention.base import AttentionBackend
from tilefleet_worker.batch import build_batch
from tilefleet_worker.errors import EngineError
from tilefleet_worker.host_arena import HostArena
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.models import Model
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.sampler import sample
from tilefleet_worker.step import StepPlan, StepResult, StepRow

_CHECK_ID = "self-check"


class Runner:
    """Owns model and cache; keeps nothing about requests, so a row can be run again."""

    def __init__(
        self, model: Model, cache: KVCache, attention: AttentionBackend, host_blocks: int = 0
    ) -> None:
        """host_blocks: blocks of host memory for evicted prefixes."""
        self._model = model
        self._cache = cache
        self._attention = attention
        self._host = HostArena(cache, host_blocks)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute all rows of a plan in one pass. Raises what the framework raises."""
        with torch.inference_mode():
            logits = self._logits(plan)
            rows = tuple(row for row in plan.rows if row.num_logits)
            result = sample(logits, rows) if rows else StepResult({})
            for row in rows:
                if row.request_id in result.faults:
                    for block_ids in row.tables:
                        self._cache.scrub(block_ids)
            return result

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Copy blocks between pool and host memory."""
        self._host.copy(transfers)

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Logits [sampled rows, vocabulary] of a plan, for tests and measurements."""
        with torch.inference_mode():
            return self._logits(plan)

    def _logits(self, plan: StepPlan) -> torch.Tensor:
        batch = build_batch(plan, self._cache.block_size)
        steps = [self._attention.plan(part) for part in batch.attention]
        return self._model.forward(batch, steps, self._cache)

    def batch_invariant(self) -> bool:
        """Measure whether a request has the same logits, bit by bit, alone and in a batch.

        Shapes and kernels are chosen so that it holds on AVX2; other processors may differ. Call
        it before any request: it writes to the first blocks of the cache.
        """
        length = self._cache.block_size
        tables = self._cache.num_tables
        rows = [
            _probe(0, (1,) * length, range(row * tables, (row + 1) * tables))
            for row in range(min(5, self._cache.num_blocks // tables))
        ]
        prompts = self.logits(StepPlan.of(rows))
        decodes = [_probe(length - 1, (1,), [block for (block,) in row.tables]) for row in rows]
        together = self.logits(StepPlan.of(decodes))
        alone = self.logits(StepPlan.of([decodes[0]]))
        expected = prompts[:1].expand_as(prompts)
        return all(part.equal(expected[: len(part)]) for part in (prompts, together, alone))

    def check(self) -> None:
        """Run one token in the spare block. Raises EngineError when that gives no token."""
        row = _probe(0, (0,), self._spare_tables)
        result = self.run(StepPlan.of([row]))
        if _CHECK_ID not in result.tokens:
            raise EngineError(f"The self-check failed: {result.faults.get(_CHECK_ID)}.")

    @property
    def _spare_tables(self) -> list[int]:
        return [self._cache.spare_block_id] * self._cache.num_tables

    def warm_up(self, max_tokens: int) -> None:
        """Run a prompt of up to `max_tokens` tokens and one decode, in the spare block.

        First calls build oneDNN's kernels and fault in memory: better here than under a request.
        """
        length = min(max_tokens, self._cache.block_size)
        row = _probe(0, (0,) * length, self._spare_tables)
        self.run(StepPlan.of([row]))
        self.check()


def _probe(start: int, token_ids: tuple[int, ...], blocks: Iterable[int]) -> StepRow:
    """A greedy row of nobody's request. blocks: the one of each table."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    first, *others = ((block,) for block in blocks)
    return StepRow(
        _CHECK_ID, start, token_ids, first, True, params, seed=0, more_tables=tuple(others)
    )
