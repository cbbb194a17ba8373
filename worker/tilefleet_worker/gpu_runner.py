"""The runner of a GPU: fused decoder, paged pool, and captured graphs for steps of decodes only.

CUDA and ROCm by the same calls. On a CPU it runs the same kernels in Triton's interpreter, without
graphs, for tests.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from tilefleet_worker.attention.triton.backend import TritonAttention
from tilefleet_worker.errors import EngineError
from tilefleet_worker.fused_decoder import FusedDecoder, StepInputs
from tilefleet_worker.gpu_step import LaunchedStep, Mailbox
from tilefleet_worker.graphs import DecodeGraphs
from tilefleet_worker.host_arena import HostArena
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.kernels.ahead import compiling
from tilefleet_worker.kernels.sampling import SamplerWorkspace, choose_tokens
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.rank_group import RankGroup
from tilefleet_worker.rank_messages import Kind, Words, from_arrays, to_arrays
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.step import StepPlan, StepResult, StepRow
from tilefleet_worker.step_arrays import Ints, StepArrays, lay_out
from tilefleet_worker.step_inputs import InputBuffer

# A larger step takes so long on the device that its launches are hidden behind it.
MAX_GRAPH_ROWS = 512
_CHECK_ID = "self-check"


class GPURunner:
    """Owns decoder, cache and graphs; keeps the newest token of each slot, else nothing.

    `launch` returns at once. All launches are on one stream, so that a step finds what the one
    before it wrote: KV and newest tokens. A row can be run again.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: KVCache,
        attention: TritonAttention,
        inputs: InputBuffer,
        sampler: SamplerWorkspace,
        host_blocks: int = 0,
        ranks: RankGroup | None = None,
    ) -> None:
        """host_blocks: blocks of host memory for evicted prefixes. ranks: those that are told
        every step, where this is the first of several.
        """
        self._ranks = ranks
        self._decoder = decoder
        self._cache = cache
        self._attention = attention
        self._inputs = inputs
        self._sampler = sampler
        self._host = HostArena(cache, host_blocks)
        self._max_rows = len(sampler.tokens)
        device = sampler.tokens.device
        self._mailbox = Mailbox(self._max_rows, device)
        most = min(self._max_rows, MAX_GRAPH_ROWS)
        self._graphs = DecodeGraphs(most, device) if device.type == "cuda" else None

    def run(self, plan: StepPlan) -> StepResult:
        """Compute all rows of a plan in one pass. Raises what the framework raises."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begin a step behind those launched before. Reads the plan now, and waits for nothing.

        At most one step may be under way whose result was not asked for. Raises IndexError when a
        row reaches beyond its blocks or the step beyond what the runner was built for.
        """
        with torch.inference_mode():
            arrays = lay_out(plan, self._cache.block_size)
            logits, places = self._compute(arrays)
            rows, index = _left_to_host(plan, arrays)
            found = None
            if rows:
                index = index if places is None else places[index]
                found = self._mailbox.receive_logits(logits[index.tolist()])
            tokens = self._mailbox.receive(self._sampler.tokens[: len(arrays.samples)])
            arrived = self._mailbox.arrival()
        return LaunchedStep(tokens, _ids(plan, arrays), arrays, self._cache, rows, found, arrived)

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Copy blocks between pool and host memory, behind the steps launched; waits for nothing.

        On the stream of the steps, as a step that reads them or writes to them may follow at once.
        """
        self._host.copy(transfers)

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Logits fp32 [sampled rows, vocabulary] in the order of the plan's sampled rows."""
        with torch.inference_mode():
            arrays = lay_out(plan, self._cache.block_size)
            logits, places = self._compute(arrays)
            if places is not None:
                logits = logits[places.tolist()]
            if arrays.order is None:
                return logits
            place = {id(row): index for index, row in enumerate(_in_order(plan, arrays))}
            return logits[[place[id(row)] for row in plan.rows if row.sample]]

    def _compute(self, arrays: StepArrays) -> tuple[torch.Tensor, Ints | None]:
        """Launch a step: logits, valid until the next one, and in which rows those wanted are.

        None: they are as `arrays` wants them. The sampler's tokens are for `arrays.samples`.
        """
        graphs = self._graphs
        if graphs is None or not arrays.decode_only or arrays.num_rows > graphs.sizes[-1]:
            inputs = self._inputs.mixed(arrays)
            self._tell(arrays)
            return self._forward(inputs), None
        padded = graphs.padded(arrays.num_rows)
        inputs = self._inputs.decode(arrays, padded)
        self._tell(arrays)
        logits = graphs.replay(padded, lambda: self._forward(inputs))
        return logits[: arrays.num_rows], arrays.logits_index

    def _tell(self, arrays: StepArrays) -> None:
        """Tell the other ranks a step that this one has found to be in order."""
        if self._ranks is not None:
            self._ranks.tell(Kind.STEP, from_arrays(arrays))

    def follow(self, kind: Kind, words: Words) -> None:
        """Do what the first rank does. See RankRunner."""
        if kind == Kind.CAPTURE:
            self.capture()
            return
        with torch.inference_mode():
            if kind == Kind.SCRUB:
                self._cache.scrub(words.tolist())
            else:
                self._compute(to_arrays(words))

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits of a step whose tokens are chosen behind them. Launches only."""
        logits = self._decoder.forward(inputs, self._attention, self._cache)
        if len(inputs.samples):
            choose_tokens(logits, inputs.samples, self._sampler)
        return logits

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
        if self._ranks is not None:
            self._ranks.tell(Kind.CAPTURE)
        with torch.inference_mode():
            for padded in reversed(self._graphs.sizes):
                inputs = self._inputs.decode(None, padded)
                self._graphs.capture(padded, partial(self._forward, inputs))

    def warm_up(self, max_tokens: int) -> None:
        """Compile and load every kernel and run them once. Writes to the spare block."""
        length = min(max_tokens, self._cache.block_size)
        row = probe(0, (0,) * length, (self._cache.spare_block_id,))
        if self._graphs is not None:
            self._compile(row, self._graphs.sizes)
        self.run(StepPlan.of((row,)))
        self.check()

    def _compile(self, prompt: StepRow, batches: tuple[int, ...]) -> None:
        """Compile what a prompt and decodes of all padded sizes take, all kernels at once."""
        with torch.inference_mode(), compiling():
            self._compute(lay_out(StepPlan.of((prompt,)), self._cache.block_size))
            for padded in batches:
                self._forward(self._inputs.decode(None, padded))

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


def _left_to_host(plan: StepPlan, arrays: StepArrays) -> tuple[tuple[StepRow, ...], Ints]:
    """Rows that the host chooses or scores, and the rows of their logits as `arrays` wants them."""
    if len(arrays.samples) == len(plan):
        return (), np.zeros(0, np.int64)
    here = set(arrays.sampled.tolist())
    order = range(len(plan)) if arrays.order is None else arrays.order.tolist()
    rows: list[StepRow] = []
    places: list[int] = []
    first = 0
    for index in order:
        row = plan.rows[index]
        if index not in here and row.num_logits:
            rows.append(row)
            places.extend(range(first, first + row.num_logits))
        first += row.num_logits
    return tuple(rows), np.array(places, np.int64)


def _ids(plan: StepPlan, arrays: StepArrays) -> list[str]:
    """Requests whose tokens the device chooses, in the order of the samples."""
    if arrays.order is None:
        return plan.request_ids
    return [plan.request_ids[index] for index in arrays.sampled.tolist()]


def probe(start: int, token_ids: tuple[int, ...], block_ids: tuple[int, ...]) -> StepRow:
    """A greedy row of nobody's request."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    return StepRow(_CHECK_ID, start, token_ids, block_ids, True, params, seed=0)
