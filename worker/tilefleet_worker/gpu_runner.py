"""The runner of a GPU: fused decoder, paged pool, and captured graphs for steps of decodes only.

CUDA and ROCm by the same calls. On a CPU it runs the same kernels in Triton's interpreter, without
graphs, for tests.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from tilefleet_worker.attention.triton.backend import TritonAttention
from tilefleet_worker.errors import EngineError
from tilefleet_worker.fused_decoder import FusedDecoder
from tilefleet_worker.graphs import DecodeGraphs
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.sampler import sample
from tilefleet_worker.step import StepPlan, StepResult, StepRow
from tilefleet_worker.step_inputs import InputBuffer, StepArrays, lay_out

LOGGER = logging.getLogger(__name__)
# A larger step takes so long on the device that its launches are hidden behind it.
MAX_GRAPH_ROWS = 512
_CHECK_ID = "self-check"


class GPURunner:
    """Owns decoder, cache and graphs; keeps nothing about requests, so a row can be run again."""

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: KVCache,
        attention: TritonAttention,
        inputs: InputBuffer,
        max_rows: int,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._attention = attention
        self._inputs = inputs
        self._max_rows = max_rows
        most = min(max_rows, MAX_GRAPH_ROWS)
        self._graphs = DecodeGraphs(most, device) if device.type == "cuda" else None

    def run(self, plan: StepPlan) -> StepResult:
        """Compute all rows of a plan in one pass. Raises what the framework raises."""
        with torch.inference_mode():
            arrays = lay_out(plan, self._cache.block_size)
            logits = self._logits(arrays)
            if arrays.logits_index is None:
                return self._sampled_plain(plan, logits)
            rows = _in_order(plan, arrays)
            result = sample(logits, rows) if rows else StepResult({})
            self._scrub(rows, result)
            return result

    def _sampled_plain(self, plan: StepPlan, logits: torch.Tensor) -> StepResult:
        """Tokens of a step in which every row wants the likeliest one; others go row by row."""
        if plan.table.temperature[plan.slots].any():
            result = sample(logits, plan.rows)
            self._scrub(plan.rows, result)
            return result
        highest, best = (part.tolist() for part in logits.max(dim=-1))
        if not np.isfinite(highest).all():
            result = sample(logits, plan.rows)
            self._scrub(plan.rows, result)
            return result
        return StepResult(dict(zip(plan.request_ids, best, strict=True)))

    def _scrub(self, rows: Sequence[StepRow], result: StepResult) -> None:
        for row in rows:
            if row.request_id in result.faults:
                self._cache.scrub(row.block_ids)

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Logits fp32 [sampled rows, vocabulary] in the order of the plan's sampled rows."""
        with torch.inference_mode():
            arrays = lay_out(plan, self._cache.block_size)
            logits = self._logits(arrays)
            if arrays.order is None:
                return logits
            place = {id(row): index for index, row in enumerate(_in_order(plan, arrays))}
            return logits[[place[id(row)] for row in plan.rows if row.sample]]

    def _logits(self, arrays: StepArrays) -> torch.Tensor:
        """Logits that `arrays` want, in their order. Valid until the next step."""
        graphs = self._graphs
        if graphs is None or not arrays.decode_only or arrays.num_rows > graphs.sizes[-1]:
            return self._forward_mixed(arrays)
        padded = graphs.padded(arrays.num_rows)
        inputs = self._inputs.decode(arrays, padded)
        logits = graphs.replay(
            padded, lambda: self._decoder.forward(inputs, self._attention, self._cache)
        )
        if arrays.logits_index is None:
            return logits[: arrays.num_rows]
        return logits[torch.from_numpy(arrays.logits_index).to(logits.device)]

    def _forward_mixed(self, arrays: StepArrays) -> torch.Tensor:
        inputs = self._inputs.mixed(arrays)
        return self._decoder.forward(inputs, self._attention, self._cache)

    @property
    def graph_facts(self) -> dict[str, int]:
        """Number of captured graphs and the bytes that they took; empty without graphs."""
        if self._graphs is None:
            return {}
        return {"graphs": len(self._graphs.sizes), "graph_bytes": self._graphs.memory_bytes}

    def capture(self) -> None:
        """Capture the graph of every padded batch size, the largest first: they share memory."""
        if self._graphs is None:
            return
        with torch.inference_mode():
            for padded in reversed(self._graphs.sizes):
                inputs = self._inputs.decode(None, padded)
                self._graphs.capture(
                    padded,
                    lambda inputs=inputs: self._decoder.forward(  # type: ignore[misc]
                        inputs, self._attention, self._cache
                    ),
                )

    def warm_up(self, max_tokens: int) -> None:
        """Compile and load every kernel and run them once. Writes to the spare block."""
        length = min(max_tokens, self._cache.block_size)
        row = probe(0, (0,) * length, (self._cache.spare_block_id,))
        self.run(StepPlan.of((row,)))
        self.check()

    def check(self) -> None:
        """Run one token in the spare block. Raises EngineError when that gives no token."""
        row = probe(0, (0,), (self._cache.spare_block_id,))
        result = self.run(StepPlan.of((row,)))
        if _CHECK_ID not in result.tokens:
            raise EngineError(f"The self-check failed: {result.faults.get(_CHECK_ID)}.")

    def batch_invariant(self) -> bool:
        """Measure whether decodes have the same logits, bit by bit, alone and in a batch.

        At 5 and at the most rows: the library's products choose other kernels for large batches.
        Call it before any request: it writes to the first block of the cache.
        """
        length = self._cache.block_size
        self.logits(StepPlan.of((probe(0, (1,) * length, (0,)),)))
        row = probe(length - 1, (1,), (0,))  # rewrites what is there
        alone = self.logits(StepPlan.of((row,))).clone()
        counts = {min(count, self._max_rows) for count in (5, self._max_rows)}
        batches = (self.logits(StepPlan.of((row,) * count)) for count in sorted(counts))
        return all(logits.equal(alone.expand_as(logits)) for logits in batches)


def _in_order(plan: StepPlan, arrays: StepArrays) -> tuple[StepRow, ...]:
    """Rows that want logits, in the order of the arrays."""
    order = range(len(plan)) if arrays.order is None else arrays.order.tolist()
    return tuple(row for row in (plan.rows[index] for index in order) if row.num_logits)


def probe(start: int, token_ids: tuple[int, ...], block_ids: tuple[int, ...]) -> StepRow:
    """A greedy row of nobody's request."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    return StepRow(_CHECK_ID, start, token_ids, block_ids, True, params, seed=0)
