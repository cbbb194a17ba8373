"""A request in progress: its tokens so far, how many are computed, and its blocks."""

from tilefleet_worker.block_pool import BlockPool, chain_hash
from tilefleet_worker.request import FinishReason, Request
from tilefleet_worker.step import StepRow


class Sequence:
    """State of one accepted request. No phases: `num_computed` catches up with `num_tokens`."""

    def __init__(self, request: Request, order: int, eos_token_ids: tuple[int, ...]) -> None:
        params = request.params
        own_end_ids = () if params.ignore_eos else eos_token_ids
        self.request = request
        self.order = order
        """Age: smaller is older. Kept over preemption."""
        self.token_ids = list(request.prompt_token_ids)
        self.num_computed = 0
        self.block_ids: tuple[int, ...] = ()
        self.num_cached_tokens: int | None = None
        """Prompt tokens that a hit spared at first admission; None before it."""
        self.num_preemptions = 0
        self.num_overtaken = 0
        """How often a younger request was admitted while this one did not fit."""
        self._end_token_ids = (*own_end_ids, *params.stop_token_ids)
        self._seed = request.sampling_seed()
        self._hashes: list[bytes] = []
        self._num_published = 0

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens the caller sent."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed

    def prefix_hashes(self, pool: BlockPool) -> list[bytes]:
        """Hashes of the full blocks that a hit may cover.

        The block of the last token is left out: without computing it there are no logits.
        """
        self._extend_hashes(pool, self.num_tokens)
        return self._hashes[: (self.num_tokens - 1) // pool.block_size]

    def admit(self, pool: BlockPool, hit_blocks: list[int]) -> None:
        """Take the blocks of a hit and new ones for all other tokens."""
        pool.acquire(hit_blocks)
        new = pool.allocate(pool.blocks_for(self.num_tokens) - len(hit_blocks))
        self.block_ids = (*hit_blocks, *new)
        self.num_computed = len(hit_blocks) * pool.block_size
        self._num_published = len(hit_blocks)
        if self.num_cached_tokens is None:
            self.num_cached_tokens = self.num_computed

    def release(self, pool: BlockPool) -> None:
        """Give all blocks back. Idempotent. The tokens stay, so that work can start again."""
        pool.release(self.block_ids)
        self.block_ids = ()
        self.num_computed = 0
        self._num_published = 0

    def advance(self, pool: BlockPool, num_computed: int) -> None:
        """Note that tokens before `num_computed` are in the cache, and publish what is full."""
        self.num_computed = num_computed
        if not pool.prefix_caching:
            return
        self._extend_hashes(pool, num_computed)
        for index in range(self._num_published, num_computed // pool.block_size):
            pool.publish(self.block_ids[index], self._hashes[index])
            self._num_published = index + 1

    def _extend_hashes(self, pool: BlockPool, num_tokens: int) -> None:
        if not pool.prefix_caching:
            return
        size = pool.block_size
        for index in range(len(self._hashes), num_tokens // size):
            parent = self._hashes[-1] if self._hashes else pool.root(self.request.cache_salt)
            tokens = self.token_ids[index * size : (index + 1) * size]
            self._hashes.append(chain_hash(parent, tokens))

    def row(self, length: int) -> StepRow:
        """The next `length` tokens as a row of a plan."""
        start = self.num_computed
        params = self.request.params
        banned = self._end_token_ids if self.num_generated < params.min_tokens else ()
        return StepRow(
            request_id=self.request_id,
            start=start,
            token_ids=tuple(self.token_ids[start : start + length]),
            block_ids=self.block_ids,
            sample=length == self.num_remaining,
            params=params,
            seed=self._seed,
            banned_token_ids=banned,
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token. Returns why the request ends with it, or None."""
        self.token_ids.append(token_id)
        params = self.request.params
        if token_id in self._end_token_ids and self.num_generated > params.min_tokens:
            return "stop"
        return "length" if self.num_generated >= params.max_tokens else None
