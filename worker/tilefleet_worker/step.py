"""The value that the scheduler hands to the runner, and the one it gets back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import compress
from typing import Protocol

import numpy as np

from tilefleet_worker.history import TokenHistory
from tilefleet_worker.request import Request, SamplingParams, TokenConstraint, TokenLogprob
from tilefleet_worker.request_table import Bools, Ints, RequestTable


@dataclass(frozen=True, slots=True)
class StepRow:
    """Tokens `start … start + length` of one request, to be computed in this step."""

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    """Blocks of the whole request in the first table: position p is in
    block_ids[p // block_size]."""
    sample: bool
    """True when these tokens reach the end of the request, so that a next token is wanted."""
    params: SamplingParams
    seed: int
    banned_token_ids: tuple[int, ...] = ()
    """Tokens that must not be sampled now (end tokens before min_tokens)."""
    history: TokenHistory | None = None
    """What penalties and bad words look at; None when the request has none."""
    constraint: TokenConstraint | None = None
    """The grammar that the next token must follow, in the state before it."""
    targets: tuple[int, ...] = ()
    """Tokens that follow `token_ids[0]`, `[1]`, … in the prompt and whose logprobs are wanted."""
    drafts: tuple[int, ...] = ()
    """The last of `token_ids`: guesses that a step checks. Logits are wanted at each of them."""
    more_tables: tuple[tuple[int, ...], ...] = ()
    """Blocks in the tables of further groups of layers; the spare block where they left a window.
    """

    @property
    def length(self) -> int:
        """Tokens of this row."""
        return len(self.token_ids)

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """One table of blocks for each group of layers."""
        return (self.block_ids, *self.more_tables)

    @property
    def end(self) -> int:
        """Tokens of the request that are computed after this step, and position of the next.

        Drafts do not count: the position of the next token is that of the first of them.
        """
        return self.start + len(self.token_ids) - len(self.drafts)

    @property
    def num_logits(self) -> int:
        """Tokens of this row whose logits are wanted: those before targets, the last one, and
        all drafts.
        """
        return len(self.targets) + self.sample + len(self.drafts)


class RowOwner(Protocol):
    """What a plan needs of a request to spell out its row."""

    @property
    def request_id(self) -> str:
        """Id of the request."""
        ...

    def row(
        self, start: int, length: int, tables: tuple[tuple[int, ...], ...], sample: bool
    ) -> StepRow:
        """The row of these tokens. tables: the request's blocks, see RequestTable.tables_of."""
        ...


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step: what to compute, as arrays over rows. Empty is a legal state.

    starts, lengths: tokens `start … start + length` of the request in `slots`. sample: these reach
    the request's end, so that a next token is wanted. pending: the last of them is the token that
    the step before samples for the same slot, and that no commit has named yet. epochs: whose slot
    it was. num_drafts: how many of the tokens are guesses; None: none of any row. `table` and
    `owners` are the scheduler's own: read them before the next commit.
    """

    table: RequestTable
    owners: Sequence[RowOwner]
    slots: Ints
    epochs: Ints
    starts: Ints
    lengths: Ints
    sample: Bools
    pending: Bools
    num_drafts: Ints | None = None

    @classmethod
    def of(cls, rows: Sequence[StepRow]) -> "StepPlan":
        """A plan of given rows, with a table of its own: for checks, measurements and tests."""
        table = RequestTable(len(rows), max((len(row.block_ids) for row in rows), default=0))
        slots = np.array([_enter(table, row) for row in rows], np.int64)
        return cls(
            table=table,
            owners=tuple(_Given(row) for row in rows),
            slots=slots,
            epochs=table.epoch[slots],
            starts=np.array([row.start for row in rows], np.int64),
            lengths=np.array([row.length for row in rows], np.int64),
            sample=np.array([row.sample for row in rows], np.bool_),
            pending=np.zeros(len(rows), np.bool_),
            num_drafts=np.array([len(row.drafts) for row in rows], np.int64),
        )

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step, drafts among them."""
        return int(self.lengths.sum())

    @property
    def num_sampled(self) -> int:
        """Rows that want a token."""
        return int(np.count_nonzero(self.sample))

    @property
    def ends(self) -> Ints:
        """Tokens of each request that are computed after this step, without drafts."""
        ends = self.starts + self.lengths
        return ends if self.num_drafts is None else ends - self.num_drafts

    def select(self, keep: Bools) -> "StepPlan":
        """The rows for which `keep` is true."""
        return StepPlan(
            self.table,
            tuple(compress(self.owners, keep.tolist())),
            self.slots[keep],
            self.epochs[keep],
            self.starts[keep],
            self.lengths[keep],
            self.sample[keep],
            self.pending[keep],
            None if self.num_drafts is None else self.num_drafts[keep],
        )

    def alone(self, index: int) -> "StepPlan":
        """A plan of one of the rows."""
        return self.select(np.arange(len(self)) == index)

    @cached_property
    def request_ids(self) -> list[str]:
        """Ids in the order of the rows."""
        return [owner.request_id for owner in self.owners]

    @cached_property
    def rows(self) -> tuple[StepRow, ...]:
        """The rows as objects. A pending token has no name yet and is given as 0."""
        parts = zip(
            self.owners,
            self.starts.tolist(),
            self.lengths.tolist(),
            self.slots.tolist(),
            self.sample.tolist(),
            strict=True,
        )
        return tuple(
            owner.row(start, length, self.table.tables_of(slot), sample)
            for owner, start, length, slot, sample in parts
        )


@dataclass(frozen=True, slots=True)
class _Given:
    """Owner of a row that is already spelled out."""

    given: StepRow

    @property
    def request_id(self) -> str:
        return self.given.request_id

    def row(
        self, start: int, length: int, tables: tuple[tuple[int, ...], ...], sample: bool
    ) -> StepRow:
        del start, length, tables, sample
        return self.given


def _enter(table: RequestTable, row: StepRow) -> int:
    request = Request(row.request_id, row.token_ids, row.params, arrival_seconds=0.0)
    slot = table.take(request, row.end, row.banned_token_ids)
    table.start_at(slot, row.start, 0)
    table.kinds[0].extend(slot, row.block_ids)
    table.last_token[slot] = row.token_ids[-1] if row.token_ids else 0
    table.set_sampler(slot, row.params, row.seed)
    plain = row.params.plain and not row.banned_token_ids
    table.plain[slot] = plain and row.constraint is None and not row.targets
    return slot


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a runner returns: a token, or a fault, for each row that wanted one."""

    tokens: Mapping[str, int]
    faults: Mapping[str, str] = field(default_factory=dict)
    """request id → why this row alone has no token (for example logits that are not finite)."""
    logprobs: Mapping[str, TokenLogprob] = field(default_factory=dict)
    """Of the token in `tokens`, for rows that ask for it."""
    prompt_logprobs: Mapping[str, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    """One for each target of a row that has any."""
    accepted: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tokens behind the one in `tokens`, of rows with drafts: one for each that came true."""

    @classmethod
    def joined(cls, parts: Sequence["StepResult"]) -> "StepResult":
        """One result of steps that were run one by one."""
        names = [name.name for name in fields(cls)]
        found = {
            name: {key: value for part in parts for key, value in getattr(part, name).items()}
            for name in names
        }
        return cls(**found)
