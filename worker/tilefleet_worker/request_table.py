"""The request table: what a step needs of every running request, as arrays over slots.

A request has a slot while it holds KV blocks. Arrays, because a step looks at all running requests:
at 256 of them a Python object each costs 13 µs a request and step, and numpy less than one.
Knows no tensor, no pool and no policy.
"""

import numpy as np
import numpy.typing as npt

from tilefleet_worker.request import Request

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FREE = -1
# No token: pads the rows of end_token_ids.
NO_TOKEN = -1


class RequestTable:
    """Arrays indexed by slot. A free slot has epoch -1; an epoch is never used twice."""

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self.num_slots = num_slots
        self.epoch = np.full(num_slots, FREE, np.int64)
        self.num_tokens = np.zeros(num_slots, np.int64)  # prompt and committed answer
        self.num_ahead = np.zeros(num_slots, np.int64)  # tokens of steps that are not committed
        self.num_scheduled = np.zeros(num_slots, np.int64)  # tokens in the cache after those steps
        self.num_computed = np.zeros(num_slots, np.int64)  # tokens in the cache now
        self.num_published = np.zeros(num_slots, np.int64)  # blocks in the prefix index
        self.num_blocks = np.zeros(num_slots, np.int64)
        self.num_prompt = np.zeros(num_slots, np.int64)
        self.limit = np.zeros(num_slots, np.int64)  # tokens at which it ends by length
        self.end_from = np.zeros(num_slots, np.int64)  # tokens from which an end token ends it
        self.end_token_ids = np.full((num_slots, 1), NO_TOKEN, np.int64)  # grows to the longest
        self.last_token = np.zeros(num_slots, np.int64)  # the newest committed token
        self.num_cached = np.zeros(num_slots, np.int64)  # see Sequence.num_cached_tokens
        # Only pages that are written take memory: a table for long contexts costs nothing unused.
        self.block_ids = np.zeros((num_slots, max_blocks), np.int32)
        # What the sampler reads, so that a batch is sampled without its requests.
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_p = np.ones(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.seed = np.zeros(num_slots, np.uint64)
        self.plain = np.zeros(num_slots, np.bool_)
        """True: the next token depends on logits, temperature, top-k, top-p, seed and position."""
        self._free = list(range(num_slots - 1, -1, -1))
        self._next_epoch = 0

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
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.top_k[slot] = params.top_k
        self.seed[slot] = request.sampling_seed()
        self.plain[slot] = params.plain and request.constraint is None
        return slot

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

    def extend_blocks(self, slot: int, block_ids: tuple[int, ...]) -> None:
        """Append blocks to a request's row."""
        held = int(self.num_blocks[slot])
        self.block_ids[slot, held : held + len(block_ids)] = block_ids
        self.num_blocks[slot] = held + len(block_ids)

    def append_block_each(self, slots: Ints, block_ids: tuple[int, ...]) -> None:
        """Append one block to each of these rows."""
        held = self.num_blocks[slots]
        self.block_ids[slots, held] = block_ids
        self.num_blocks[slots] = held + 1

    def blocks_of(self, slot: int) -> tuple[int, ...]:
        """Blocks of a request, in order."""
        return tuple(self.block_ids[slot, : self.num_blocks[slot]].tolist())

    def give_back(self, slot: int) -> None:
        """Free a slot. What steps under way still say about it is recognised by its epoch."""
        self.epoch[slot] = FREE
        self.num_blocks[slot] = 0
        self._free.append(slot)
