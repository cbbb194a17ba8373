"""A request in progress: its tokens so far, its place in the table, and its chain of hashes."""

from array import array

from tilefleet_worker.block_pool import BlockPool, Hit
from tilefleet_worker.fair_order import Turn
from tilefleet_worker.history import TokenHistory
from tilefleet_worker.layer_kinds import Demand
from tilefleet_worker.prefix_chain import PrefixChain
from tilefleet_worker.request import Delta, Request, TokenLogprob
from tilefleet_worker.request_table import RequestTable
from tilefleet_worker.step import StepRow

NO_SLOT = -1


class Sequence:
    """One accepted request. What every step reads is in the table, under `slot`."""

    def __init__(self, request: Request, turn: Turn, eos_token_ids: tuple[int, ...]) -> None:
        params = request.params
        own_end_ids = () if params.ignore_eos else eos_token_ids
        self.request = request
        self.request_id = request.request_id
        self.turn = turn
        """Age: smaller is older. Kept over preemption."""
        self.token_ids = array("I", request.prompt_token_ids)
        """Prompt and committed answer."""
        self.num_prompt_tokens = len(self.token_ids)
        self.slot = NO_SLOT
        self.num_cached_tokens: int | None = None
        """Prompt tokens that a hit spared at first admission; None before it."""
        self.num_host_tokens = 0
        """Those among them that came from the host's memory."""
        self.num_preemptions = 0
        self.num_overtaken = 0
        """How often a younger request was admitted while this one did not fit."""
        self.end_token_ids = (*own_end_ids, *params.stop_token_ids)
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        """Scores of the prompt's tokens from the second on, as far as they are known."""
        self.drafts: tuple[int, ...] = ()
        """Guesses that the step under way computes behind its last token."""
        self._seed = request.sampling_seed()
        self._history = TokenHistory(request.prompt_token_ids) if params.looks_back else None
        self._chain: PrefixChain | None = None
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

        The block of the last token is left out: without computing it there are no logits. So is
        every block of a prompt whose own tokens are to be scored.
        """
        if self.wants_scores:
            return []
        hashes = self.block_hashes(pool, self.num_tokens // pool.block_size)
        return hashes[: (self.num_tokens - 1) // pool.block_size]

    @property
    def wants_scores(self) -> bool:
        """True while tokens of the prompt are still to be scored."""
        known = len(self.prompt_logprobs) + 1
        return self.request.params.prompt_logprobs is not None and known < self.num_prompt_tokens

    def next_hash(self, table: RequestTable) -> bytes | None:
        """Hash of the next block that this running request will publish; None if not known."""
        published = int(table.num_published[self.slot])
        return self._hashes[published] if published < len(self._hashes) else None

    def take(self, token_id: int) -> None:
        """Note a generated token where more than its position matters: history and grammar.

        Raises ValueError when the grammar does not allow it.
        """
        if self.request.constraint is not None:
            self.request.constraint.accept(token_id)
        if self._history is not None:
            self._history.append(token_id)

    def take_scores(self, start: int, scores: tuple[TokenLogprob, ...]) -> None:
        """Note the scores of the targets of a row; those known from before a preemption stay."""
        self.prompt_logprobs += scores[max(0, len(self.prompt_logprobs) - start) :]

    def scored(self, delta: Delta, found: TokenLogprob | None) -> Delta:
        """The delta with the log probability of its token, and once with those of the prompt."""
        first = self.num_tokens == self.num_prompt_tokens + 1
        return delta._replace(
            logprobs=() if found is None else (found,),
            prompt_logprobs=self.prompt_logprobs if first else (),
        )

    def admit(self, table: RequestTable, pool: BlockPool, demand: Demand, hit: Hit) -> None:
        """Take a slot, the blocks of a hit and new ones for the tokens behind it."""
        tables = pool.acquire(hit)
        self.slot = table.take(self.request, self.num_tokens, self.end_token_ids)
        wanted = demand.admission(self.num_tokens, hit.num_spans)
        for index, (kind, count) in enumerate(zip(table.kinds, wanted, strict=True)):
            found = tables[index]
            kind.start(self.slot, hit.num_spans - len(found) // kind.width, pool.spare_block_id)
            kind.extend(self.slot, found)
            kind.extend(self.slot, pool.allocate(count, index))
        computed = hit.num_spans * pool.block_size
        table.start_at(self.slot, computed, hit.num_spans)
        table.last_token[self.slot] = self.token_ids[-1]
        if self.num_cached_tokens is None:
            self.num_cached_tokens = computed
            self.num_host_tokens = hit.num_spans_on_host * pool.block_size
        table.num_cached[self.slot] = self.num_cached_tokens

    def publish(self, table: RequestTable, pool: BlockPool) -> None:
        """Make all spans that are full of computed tokens, and still held, findable."""
        start = int(table.num_published[self.slot])
        end = int(table.num_computed[self.slot]) // pool.block_size
        if pool.prefix_caching and start < end:
            hashes = self.block_hashes(pool, end)
            for index, kind in enumerate(table.kinds):
                first = max(start, int(kind.first_span[self.slot]))
                blocks = kind.block_ids[self.slot, first * kind.width : end * kind.width]
                pool.publish(blocks.tolist(), hashes[first:end], index)
            table.num_published[self.slot] = end

    def drop_unseen(self, table: RequestTable, pool: BlockPool) -> None:
        """Give back the spans that left their window. Those published stay cached prefixes."""
        computed = int(table.num_computed[self.slot])
        for index, (kind, held) in enumerate(zip(pool.kinds, table.kinds, strict=True)):
            first = kind.first_span(computed, pool.block_size)
            if first > held.first_span[self.slot]:
                pool.release(held.drop_first(self.slot, first, pool.spare_block_id), index)

    def release(self, table: RequestTable, pool: BlockPool) -> None:
        """Give slot and blocks back. Idempotent. The tokens stay, so that work can start again."""
        if self.slot == NO_SLOT:
            return
        for index, kind in enumerate(table.kinds):
            pool.release(kind.held(self.slot), index)
        table.give_back(self.slot)
        self.slot, self.drafts = NO_SLOT, ()

    def block_hashes(self, pool: BlockPool, num_blocks: int) -> list[bytes]:
        """Hashes of at least the first `num_blocks` blocks, whose tokens must be known."""
        first = len(self._hashes)
        if pool.prefix_caching and num_blocks > first:
            if self._chain is None:
                self._chain = PrefixChain(pool.root(self.request.cache_salt))
            size = pool.block_size
            tokens = self.token_ids[first * size : num_blocks * size]
            self._hashes += self._chain.extend(tokens, size)
        return self._hashes

    def row(
        self, start: int, length: int, tables: tuple[tuple[int, ...], ...], sample: bool
    ) -> StepRow:
        """`length` tokens from `start` on as a row. Tokens that have no name yet are given as 0."""
        params, end = self.request.params, start + length
        known = tuple(self.token_ids[start:end])
        unknown = length - len(known)
        early = end - self.num_prompt_tokens < params.min_tokens
        return StepRow(
            request_id=self.request_id,
            start=start,
            token_ids=known + (self.drafts or (0,) * unknown),
            block_ids=tables[0],
            more_tables=tables[1:],
            drafts=self.drafts,
            sample=sample,
            params=params,
            seed=self._seed,
            banned_token_ids=self.end_token_ids if early else (),
            history=self._history,
            constraint=self.request.constraint,
            targets=self._targets(start, end) if self.wants_scores else (),
        )

    def _targets(self, start: int, end: int) -> tuple[int, ...]:
        """Prompt tokens that follow those from `start` to `end`.

        A prompt that is computed again after a preemption is scored again from its beginning.
        """
        return tuple(self.token_ids[start + 1 : min(end + 1, self.num_prompt_tokens)])
