"""The request table: what a step needs of every running request, as arrays over slots.

A request has a slot while it holds KV blocks. Arrays, because a step looks at all running requests:
at 256 of them a Python object each costs 13 µs a request and step, and numpy less than one.
Knows no tensor, no pool and no policy.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tilefleet_worker.layer_kinds import FULL, LayerKind
from tilefleet_worker.request import Request, SamplingParams

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FREE = -1
# No token: pads the rows of end_token_ids.
NO_TOKEN = -1
# What the device's sampler reads of a row, 12 words of 4 bytes. slot: where its token is kept, or
# -1: the device chooses none. logits_row and position are the step's, all else is the request's.
SAMPLER = np.dtype(
    [
        ("slot", np.int32),
        ("logits_row", np.int32),
        ("position", np.int32),
        ("top_k", np.int32),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("seed", np.uint64),
    ]
)


class KindTable:
    """The blocks of one layer kind, span by span: those of tokens p are in span p // block_size.

    A request holds the spans from `first_span` up to `num_spans`; those before it left the window.
    """

    def __init__(self, num_slots: int, max_spans: int, width: int) -> None:
        self.width = width
        # Only pages that are written take memory: a table for long contexts costs nothing unused.
        self.block_ids = np.zeros((num_slots, max_spans * width), np.int32)
        self.num_spans = np.zeros(num_slots, np.int64)
        self.first_span = np.zeros(num_slots, np.int64)

    def start(self, slot: int, first_span: int, spare_block_id: int) -> None:
        """Begin a row that holds nothing before a span: the spare block stands there instead."""
        self.block_ids[slot, : first_span * self.width] = spare_block_id
        self.num_spans[slot] = self.first_span[slot] = first_span

    def extend(self, slot: int, block_ids: Sequence[int]) -> None:
        """Append spans to a request's row."""
        held = int(self.num_spans[slot]) * self.width
        self.block_ids[slot, held : held + len(block_ids)] = block_ids
        self.num_spans[slot] += len(block_ids) // self.width

    def append_each(self, slots: Ints, block_ids: Sequence[int]) -> None:
        """Append one span to each of these rows."""
        held = self.num_spans[slots]
        if self.width == 1:
            self.block_ids[slots, held] = block_ids
        else:
            places = held[:, None] * self.width + np.arange(self.width)
            self.block_ids[slots[:, None], places] = np.reshape(block_ids, (-1, self.width))
        self.num_spans[slots] = held + 1

    def drop_first(self, slot: int, first_span: int, spare_block_id: int) -> list[int]:
        """Let go of the spans before `first_span`. Returns their blocks."""
        part = slice(int(self.first_span[slot]) * self.width, first_span * self.width)
        dropped: list[int] = self.block_ids[slot, part].tolist()
        self.block_ids[slot, part] = spare_block_id
        self.first_span[slot] = first_span
        return dropped

    def drop_last(self, slot: int, num_spans: int) -> list[int]:
        """Let go of the spans from `num_spans` on. Returns their blocks."""
        part = slice(num_spans * self.width, int(self.num_spans[slot]) * self.width)
        self.num_spans[slot] = num_spans
        dropped: list[int] = self.block_ids[slot, part].tolist()
        return dropped

    def num_held(self, slot: int) -> int:
        """Spans that a request holds."""
        return int(self.num_spans[slot] - self.first_span[slot])

    def held(self, slot: int) -> list[int]:
        """Blocks that a request holds, span by span."""
        first, end = int(self.first_span[slot]), int(self.num_spans[slot])
        blocks: list[int] = self.block_ids[slot, first * self.width : end * self.width].tolist()
        return blocks

    def tables(self, slot: int) -> list[tuple[int, ...]]:
        """One table for each group of layers: position p is in table[p // block_size]."""
        row = self.block_ids[slot, : int(self.num_spans[slot]) * self.width]
        return [tuple(row[group :: self.width].tolist()) for group in range(self.width)]


class RequestTable:
    """Arrays indexed by slot. A free slot has epoch -1; an epoch is never used twice."""

    def __init__(
        self, num_slots: int, max_spans: int, kinds: tuple[LayerKind, ...] = (FULL,)
    ) -> None:
        self.num_slots = num_slots
        self.epoch = np.full(num_slots, FREE, np.int64)
        self.num_tokens = np.zeros(num_slots, np.int64)  # prompt and committed answer
        self.num_ahead = np.zeros(num_slots, np.int64)  # tokens of steps that are not committed
        self.num_scheduled = np.zeros(num_slots, np.int64)  # tokens in the cache after those steps
        self.num_computed = np.zeros(num_slots, np.int64)  # tokens in the cache now
        self.num_published = np.zeros(num_slots, np.int64)  # spans in the prefix index
        self.num_prompt = np.zeros(num_slots, np.int64)
        self.limit = np.zeros(num_slots, np.int64)  # tokens at which it ends by length
        self.end_from = np.zeros(num_slots, np.int64)  # tokens from which an end token ends it
        self.end_token_ids = np.full((num_slots, 1), NO_TOKEN, np.int64)  # grows to the longest
        self.last_token = np.zeros(num_slots, np.int64)  # the newest committed token
        self.num_cached = np.zeros(num_slots, np.int64)  # see Sequence.num_cached_tokens
        self.kinds = tuple(KindTable(num_slots, max_spans, kind.width) for kind in kinds)
        self.sampler = np.zeros(num_slots, SAMPLER)  # so that a batch needs none of its requests
        self.plain = np.zeros(num_slots, np.bool_)
        """True: the next token depends on logits and what is in `sampler`."""
        # How many rows of end_token_ids name each token.
        self._num_ending: Counter[int] = Counter()
        self._free = list(range(num_slots - 1, -1, -1))
        self._next_epoch = 0

    @property
    def block_ids(self) -> npt.NDArray[np.int32]:
        """Blocks of the first kind [slots, blocks]: the whole table where all layers are alike."""
        return self.kinds[0].block_ids

    @property
    def num_blocks(self) -> Ints:
        """Blocks of each slot in `block_ids`."""
        return self.kinds[0].num_spans

    @property
    def num_free(self) -> int:
        """Slots of nobody."""
        return len(self._free)

    def take(self, request: Request, num_tokens: int, end_token_ids: tuple[int, ...]) -> int:
        """Give a request a slot; its blocks are set by the caller. Raises IndexError when full."""
        slot = self._free.pop()
        params, num_prompt = request.params, len(request.prompt_token_ids)
        self.epoch[slot] = self._next_epoch
        self._next_epoch += 1
        self.num_tokens[slot] = num_tokens
        self.num_ahead[slot] = 0
        self.num_prompt[slot] = num_prompt
        self.limit[slot] = num_prompt + params.max_tokens
        self.end_from[slot] = num_prompt + params.min_tokens
        self._widen(len(end_token_ids))
        self.end_token_ids[slot] = NO_TOKEN
        self.end_token_ids[slot, : len(end_token_ids)] = end_token_ids
        self._num_ending.update(end_token_ids)
        self.set_sampler(slot, params, request.sampling_seed())
        self.plain[slot] = params.plain and request.constraint is None
        return slot

    def set_sampler(self, slot: int, params: SamplingParams, seed: int) -> None:
        """Note how the tokens of a request are drawn."""
        self.sampler[slot] = (
            slot, 0, 0, params.top_k, params.temperature, params.top_p, params.min_p, seed,
        )  # fmt: skip

    def _widen(self, num_end_tokens: int) -> None:
        missing = num_end_tokens - self.end_token_ids.shape[1]
        if missing > 0:
            self.end_token_ids = np.pad(
                self.end_token_ids, ((0, 0), (0, missing)), constant_values=NO_TOKEN
            )

    def start_at(self, slot: int, num_computed: int, num_published: int) -> None:
        """Note what the prefix cache already holds of a request."""
        self.num_computed[slot] = self.num_scheduled[slot] = num_computed
        self.num_published[slot] = num_published

    def ending(self, slots: Ints, token_ids: list[int]) -> Bools:
        """True for each of these slots that an end token among these, one a slot, ends."""
        if self._num_ending.keys().isdisjoint(token_ids):  # nearly always, and a tenth of the time
            return np.zeros(len(slots), np.bool_)
        ends: Bools = (self.end_token_ids[slots] == np.array(token_ids)[:, None]).any(axis=1)
        ends &= self.num_tokens[slots] > self.end_from[slots]
        return ends

    def tables_of(self, slot: int) -> tuple[tuple[int, ...], ...]:
        """Block tables of a request, one for each group of layers, in the order of kinds."""
        if len(self.kinds) == 1 and self.kinds[0].width == 1:
            return (tuple(self.block_ids[slot, : self.num_blocks[slot]].tolist()),)
        return tuple(table for kind in self.kinds for table in kind.tables(slot))

    def give_back(self, slot: int) -> None:
        """Free a slot. What steps under way still say about it is recognised by its epoch."""
        self.epoch[slot] = FREE
        for token_id in self.end_token_ids[slot].tolist():
            if token_id != NO_TOKEN:
                self._num_ending[token_id] -= 1
                if not self._num_ending[token_id]:
                    del self._num_ending[token_id]
        for kind in self.kinds:
            kind.num_spans[slot] = kind.first_span[slot] = 0
        self._free.append(slot)
