"""The value that the scheduler hands to the runner, and the one it gets back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tilefleet_worker.request import SamplingParams


@dataclass(frozen=True, slots=True)
class StepRow:
    """Tokens `start … start + length` of one request, to be computed in this step."""

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    """Blocks of the whole request, in order: position p lives in block_ids[p // block_size]."""
    sample: bool
    """True when these tokens reach the end of the request, so that a next token is wanted."""
    params: SamplingParams
    seed: int
    banned_token_ids: tuple[int, ...] = ()
    """Tokens that must not be sampled now (end tokens before min_tokens)."""

    @property
    def length(self) -> int:
        """Tokens of this row."""
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """Tokens of the request that are computed after this step, and position of the next."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute. Empty when nothing is to be done, which is a legal state."""

    rows: tuple[StepRow, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(row.length for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a runner returns: a token, or a fault, for each row that wanted one."""

    tokens: Mapping[str, int]
    faults: Mapping[str, str] = field(default_factory=dict)
    """request id → why this row alone has no token (for example logits that are not finite)."""
