"""A request in progress: its tokens so far, its place in the table, and its chain of hashes."""

from array import array

from tilefleet_worker.block_pool import BlockPool, extend_chain
from tilefleet_worker.request import Request
from tilefleet_worker.request_table import RequestTable
from tilefleet_worker.step import StepRow

NO_SLOT = -1


class Sequence:
    """One accepted request. What every step reads is in the table, under `slot`."""

    def __init__(self, request: Request, order: int, eos_token_ids: tuple[int, ...]) -> None:
        params = request.params
        own_end_ids = () if params.ignore_eos else eos_token_ids
        self.request = request
        self.request_id = request.request_id
        self.order = order
        """Age: smaller is older. Kept over preemption."""
        self.token_ids = array("I", request.prompt_token_ids)
        """Prompt and committed answer."""
        self.num_prompt_tokens = len(self.token_ids)
        self.slot = NO_SLOT
        self.num_cached_tokens: int | None = None
        """Prompt tokens that a hit spared at first admission; None before it."""
        self.num_preemptions = 0
        self.num_overtaken = 0
        """How often a younger request was admitted while this one did not fit."""
        self.end_token_ids = (*own_end_ids, *params.stop_token_ids)
        self._seed = request.sampling_seed()
        self._hashes: list[bytes] = []

    @property
    def is_running(self) -> bool:
        """True while it holds blocks."""
        return self.slot != NO_SLOT

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.token_ids)

    def prefix_hashes(self, pool: BlockPool) -> list[bytes]:
        """Hashes of the full blocks that a hit may cover.

        The block of the last token is left out: without computing it there are no logits.
        """
        hashes = self.block_hashes(pool, self.num_tokens // pool.block_size)
        return hashes[: (self.num_tokens - 1) // pool.block_size]

    def admit(self, table: RequestTable, pool: BlockPool, hit_blocks: list[int]) -> None:
        """Take a slot, the blocks of a hit and new ones for all other tokens."""
        pool.acquire(hit_blocks)
        new = pool.allocate(pool.blocks_for(self.num_tokens) - len(hit_blocks))
        self.slot = table.take(self.request, self.num_tokens, self.end_token_ids)
        table.extend_blocks(self.slot, (*hit_blocks, *new))
        computed = len(hit_blocks) * pool.block_size
        table.start_at(self.slot, computed, len(hit_blocks))
        table.last_token[self.slot] = self.token_ids[-1]
        if self.num_cached_tokens is None:
            self.num_cached_tokens = computed
        table.num_cached[self.slot] = self.num_cached_tokens

    def release(self, table: RequestTable, pool: BlockPool) -> None:
        """Give slot and blocks back. Idempotent. The tokens stay, so that work can start again."""
        if self.slot == NO_SLOT:
            return
        pool.release(table.blocks_of(self.slot))
        table.give_back(self.slot)
        self.slot = NO_SLOT

    def block_hashes(self, pool: BlockPool, num_blocks: int) -> list[bytes]:
        """Hashes of at least the first `num_blocks` blocks, whose tokens must be known."""
        first = len(self._hashes)
        if pool.prefix_caching and num_blocks > first:
            size = pool.block_size
            parent = self._hashes[-1] if first else pool.root(self.request.cache_salt)
            tokens = self.token_ids[first * size : num_blocks * size]
            self._hashes += extend_chain(parent, tokens, size)
        return self._hashes

    def row(self, start: int, length: int, block_ids: tuple[int, ...], sample: bool) -> StepRow:
        """`length` tokens from `start` on as a row. Tokens that have no name yet are given as 0."""
        params, end = self.request.params, start + length
        known = tuple(self.token_ids[start:end])
        early = end - self.num_prompt_tokens < params.min_tokens
        return StepRow(
            request_id=self.request_id,
            start=start,
            token_ids=known + (0,) * (length - len(known)),
            block_ids=block_ids,
            sample=sample,
            params=params,
            seed=self._seed,
            banned_token_ids=self.end_token_ids if early else (),
        )
