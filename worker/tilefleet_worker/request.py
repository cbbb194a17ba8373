"""What a caller asks of the engine and what comes back: values without tensors or clocks."""

import hashlib
import math
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tilefleet_worker.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]

MAX_SEED = 2**63 - 1
MAX_PENALTY = 100.0
# Above any vocabulary; what a client sends must fit the arrays of the request table.
MAX_TOP_K = 2**31 - 1
MAX_LOGPROBS = 20


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
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one, in [0, 1]; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of prompt and answer less likely (CTRL, Keskar et al., 2019)."""
    frequency_penalty: float = 0.0
    """Taken from a logit for each time its token was generated."""
    presence_penalty: float = 0.0
    """Taken once from the logits of tokens that were generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token must not follow the others."""
    allowed_token_ids: tuple[int, ...] = ()
    """Only these may be generated; empty allows all."""
    logprobs: int | None = None
    """Report each token's log probability and those of this many most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, which are then computed without a cached prefix."""
    reshapes: bool = field(init=False, compare=False, repr=False, default=False)
    """True when the likeliest token of the model need not be the likeliest to be chosen."""
    looks_back: bool = field(init=False, compare=False, repr=False, default=False)
    """True when the choice depends on the tokens before."""

    def __post_init__(self) -> None:
        self._check_ranges()
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        penalised = penalties != (1.0, 0.0, 0.0)
        lists = (self.logit_bias, self.bad_words, self.allowed_token_ids)
        object.__setattr__(self, "reshapes", penalised or any(lists))
        object.__setattr__(self, "looks_back", penalised or bool(self.bad_words))

    def _check_ranges(self) -> None:
        if self.max_tokens < 1:
            raise _invalid("max_tokens", self.max_tokens, "at least 1")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise _invalid("temperature", self.temperature, "a number from 0 to 100")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise _invalid("top_k", self.top_k, f"from 0 (off) to {MAX_TOP_K}")
        if not 0.0 < self.top_p <= 1.0:
            raise _invalid("top_p", self.top_p, "above 0 and at most 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise _invalid("min_tokens", self.min_tokens, f"0 to max_tokens ({self.max_tokens})")
        if self.seed is not None and not -MAX_SEED <= self.seed <= MAX_SEED:
            raise _invalid("seed", self.seed, f"from {-MAX_SEED} to {MAX_SEED}")
        if not 0.0 <= self.min_p <= 1.0:
            raise _invalid("min_p", self.min_p, "from 0 to 1")
        if not 0.0 < self.repetition_penalty <= MAX_PENALTY:
            raise _invalid("repetition_penalty", self.repetition_penalty, "above 0 and at most 100")
        for name in ("frequency_penalty", "presence_penalty"):
            if not abs(value := getattr(self, name)) <= MAX_PENALTY:
                raise _invalid(name, value, "a number from -100 to 100")
        for token_id, bias in self.logit_bias:
            if not abs(bias) <= MAX_PENALTY:
                raise _invalid("logit_bias", bias, f"from -100 to 100 (token {token_id})")
        for name in ("logprobs", "prompt_logprobs"):
            if not 0 <= (getattr(self, name) or 0) <= MAX_LOGPROBS:
                raise _invalid(name, getattr(self, name), f"0 to {MAX_LOGPROBS}")
        if not all(self.bad_words):
            raise _invalid("bad_words", self.bad_words, "words of at least one token each")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids that these parameters name, so that a scheduler can check them."""
        biased = (token_id for token_id, _ in self.logit_bias)
        bad = (token_id for word in self.bad_words for token_id in word)
        return (*biased, *bad, *self.allowed_token_ids)

    @property
    def plain(self) -> bool:
        """True when a step needs only logits, temperature, top-k, top-p, min-p, seed and position.

        min_tokens does not count as such: it bans tokens by what was generated so far.
        """
        scored = self.logprobs is not None or self.prompt_logprobs is not None
        return self.min_tokens == 0 and not self.reshapes and not scored


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found one token, before penalties, temperature and masks.

    Natural logarithms. `rank` 1 is the most likely. `top` holds (token id, logprob), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class TokenConstraint(Protocol):
    """A grammar in progress: which tokens may come next. Owned by one request."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """True for each token [vocabulary] that may come next. Raises ValueError when broken."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a token. Raises ValueError when the grammar does not allow it."""
        ...


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
    tenant: str = ""
    """Whose request it is: tokens are shared out evenly between tenants that wait."""
    priority: int = 0
    """Smaller is served first, whatever the tenant; also preempted last."""
    deadline_seconds: float | None = None
    """When it ends with "timeout" if it has not ended before, on the clock of its arrival."""
    constraint: TokenConstraint | None = field(default=None, compare=False)
    """The grammar of the answer. It has a state: a request that carries one is submitted once."""

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

    `token_ids` includes the end token that stopped the request. After "error" and "timeout" no
    more deltas follow and `error` says why. An aborted request gets one final delta with "abort".
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that a cached prefix spared, at first admission."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, when the request asks for them."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For the prompt's tokens from the second on; once, with the first token of the answer."""
    num_preemptions: int = 0
    """How often the request lost its blocks; on the last delta."""
    started_seconds: float | None = None
    """When the request left the queue, on the engine's clock; on its first delta after that."""
    num_host_tokens: int = 0
    """Those among the cached prompt tokens that host memory held; on the last delta."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not accepted, ready to become an HTTP error."""

    status: int
    code: str
    message: str
    param: str | None
    retry_after_seconds: int | None = None
