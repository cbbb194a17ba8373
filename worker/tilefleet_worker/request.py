"""What a caller asks of the engine and what comes back: values without tensors or clocks."""

import hashlib
import math
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tilefleet_worker.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_SEED = 2**63 - 1


def _invalid(param: str, value: object, rule: str) -> RequestError:
    return RequestError(400, "invalid_value", f"{param} is {value!r}: it must be {rule}.", param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when the request ends. Raises RequestError when invalid."""

    max_tokens: int
    """Most tokens to generate, at least 1."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it before the softmax."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this, in (0, 1]."""
    seed: int | None = None
    """Same seed, same prompt: same tokens, whatever else runs. None derives it from the id."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the request besides the model's own end tokens. Reported in the Delta."""
    ignore_eos: bool = False
    """True: the model's own end tokens do not end the request; stop_token_ids still do."""
    min_tokens: int = 0
    """End tokens cannot be sampled before this many tokens were generated."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise _invalid("max_tokens", self.max_tokens, "at least 1")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise _invalid("temperature", self.temperature, "a number from 0 to 100")
        if self.top_k < 0:
            raise _invalid("top_k", self.top_k, "0 (off) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise _invalid("top_p", self.top_p, "above 0 and at most 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise _invalid("min_tokens", self.min_tokens, f"0 to max_tokens ({self.max_tokens})")
        if self.seed is not None and not -MAX_SEED <= self.seed <= MAX_SEED:
            raise _invalid("seed", self.seed, f"from {-MAX_SEED} to {MAX_SEED}")

    @property
    def plain(self) -> bool:
        """True when the next token depends on logits, the fields above, seed and position only.

        min_tokens does not count as such: it bans tokens by what was generated so far.
        """
        return self.min_tokens == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to produce. `request_id` must be unique among requests in flight."""

    request_id: str
    prompt_token_ids: TokenIds[int]
    params: SamplingParams
    arrival_seconds: float
    """When it arrived, on the clock the engine was given. Only reported, never decided on."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""

    @property
    def max_total_tokens(self) -> int:
        """Tokens of prompt and answer together at the most."""
        return len(self.prompt_token_ids) + self.params.max_tokens

    def sampling_seed(self) -> int:
        """64-bit seed of this request: the caller's, or one derived from the request id."""
        if self.params.seed is not None:
            return self.params.seed % 2**64
        return int.from_bytes(hashlib.sha256(self.request_id.encode()).digest()[:8], "little")


class Delta(NamedTuple):
    """What one step produced for one request. The last one carries a `finish_reason`.

    `token_ids` includes the end token that stopped the request. After "error" no more deltas
    follow and `error` says why. An aborted request gets one final delta with "abort".
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that a cached prefix spared, at first admission."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not accepted, ready to become an HTTP error."""

    status: int
    code: str
    message: str
    param: str | None
    retry_after_seconds: int | None = None
