"""One answer in progress: its tokens become text, cut at stop strings, with their scores."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tilefleet_worker.request import Delta, Request, TokenLogprob
from tilefleet_worker.stop_strings import StopMatcher

if TYPE_CHECKING:
    from tilefleet_worker.tokenizer import Detokenizer

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delta added to an answer. `end` is set on the last piece."""

    index: int
    text: str
    end: EndReason | None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens behind this piece, also of those without text."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt from its second token on; on the first piece only."""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How an answer is shown."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    echo: str = ""
    """Text of the prompt, shown before the answer."""
    only_echo: bool = False
    """Show nothing of the answer: the caller asked for 0 tokens, and the engine makes one."""
    prompt_logprobs: bool = False
    """The caller asked for them by themselves, and not only as a part of an echo."""


@dataclass(slots=True)
class Timing:
    """When things happened to an answer; monotonic seconds, as the engine's clock."""

    started: float = field(default_factory=time.monotonic)
    left_queue: float | None = None
    """When its first step began; known from its first token on."""
    first_token: float | None = None
    last_token: float = 0.0


class Answer:
    """The text of one request: detokenised, cut at stop strings, counted."""

    def __init__(
        self,
        index: int,
        request: Request,
        detokenizer: Detokenizer,
        options: AnswerOptions = AnswerOptions(),
        *,
        counts_prompt: bool = True,
        num_siblings: int = 1,
    ) -> None:
        """counts_prompt: False for further answers to the same prompt, which usage counts once.

        num_siblings: answers to the same prompt, with this one.
        """
        self.index = index
        self.request = request
        self.counts_prompt = counts_prompt
        self.num_siblings = num_siblings
        self.num_preemptions = 0
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_host_tokens = 0
        self.total_logprob = 0.0
        """Sum of the log probabilities of its tokens, as far as they were asked for."""
        self.timing = Timing()
        self.end: EndReason | None = None
        self.shows_prompt_logprobs = options.prompt_logprobs
        self._options = options
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(options.stops, include=options.include_stop)
        self._text = options.echo

    def take(self, delta: Delta) -> Piece:
        """The piece that a delta adds. Sets `end`, by the delta's reason or by a stop string."""
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.num_host_tokens = max(self.num_host_tokens, delta.num_host_tokens)
        self.num_preemptions = max(self.num_preemptions, delta.num_preemptions)
        self.timing.left_queue = delta.started_seconds or self.timing.left_queue
        self.total_logprob += sum(entry.logprob for entry in delta.logprobs)
        text, self._text = self._text, ""
        if self._options.only_echo:
            self.end = "length" if delta.finish_reason else None
            return Piece(self.index, text, self.end, (), delta.prompt_logprobs)
        before = self.num_tokens
        text += self._read(delta)
        logprobs = delta.logprobs[: self.num_tokens - before]
        return Piece(self.index, text, self.end, logprobs, delta.prompt_logprobs)

    def _read(self, delta: Delta) -> str:
        """Text of a delta's tokens, up to a stop string."""
        visible = len(delta.token_ids) - (delta.finish_reason == "stop")
        text = ""
        for position, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            # The token that stopped the request has no text, even if it is an ordinary one.
            piece = self._detokenizer.push([token_id]) if position < visible else ""
            text += self._shown(piece)
            if self._matcher.matched is not None:
                self.end = "stop"
                return text
        if delta.finish_reason in ("stop", "length"):
            text += self._matcher.push(self._detokenizer.finish())
            text += self._matcher.finish()
            self.end = "stop" if self._matcher.matched is not None else delta.finish_reason
        return text

    def _shown(self, piece: str) -> str:
        """Text that may be shown; stop strings count only after min_tokens tokens."""
        if self.num_tokens <= self.request.params.min_tokens:
            return piece
        return self._matcher.push(piece)
