"""Grammars: what an answer may look like, compiled by llguidance and applied token by token.

A grammar comes from a client, so compiling it is bounded: by the size of its text (the server's
limits), by llguidance's own fuel, and by a time after which its caller gets an error.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tilefleet_worker.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_SECONDS = 2.0
MAX_COMPILED = 64
# Between tokens of JSON: enough for any indentation, and no answer can consist of spaces alone.
_JSON_SPACE = r"[\x20\x0A\x0D\x09]{0,20}"
_COMPILERS = threading.BoundedSemaphore(2)


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match. text: a JSON schema, a regular expression, or Lark or GBNF."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    param: str
    """The request field that it came from, for errors."""
    compact: bool = False
    """JSON without any white space."""

    @classmethod
    def choice(cls, choices: Sequence[str], param: str) -> Grammar:
        """One of these texts."""
        words = (json.dumps(text, ensure_ascii=False) for text in choices)
        return cls("lark", "start: " + " | ".join(words), param)


class Grammars:
    """Compiles grammars for one model, and keeps the newest. Any thread."""

    def __init__(self, tokenizer_json: str, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        """tokenizer_json: text of tokenizer.json. vocab_size: of the model's logits.

        end_token_ids: tokens that may follow a complete answer; must not be empty.
        """
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._end_token_ids = tuple(end_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    async def constraint(self, grammar: Grammar) -> Constraint:
        """The grammar in its first state. Raises RequestError 400 when it cannot be used."""
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                return await asyncio.to_thread(self.compile, grammar)
        except TimeoutError:
            message = f"takes longer than {COMPILE_SECONDS:g} s to compile: simplify it"
            raise _refused(grammar, message) from None

    def compile(self, grammar: Grammar) -> Constraint:
        """As `constraint`, on this thread and without a time limit."""
        if not self._end_token_ids:
            raise _refused(grammar, "cannot be used: this model has no end-of-sequence token")
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            with _COMPILERS:
                matcher = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = matcher
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return Constraint(matcher.deep_copy(), self._vocab_size, self._end_token_ids)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._llguidance(), _source(grammar), log_level=0)
        except Exception as error:  # the library's own errors have no common class
            raise _refused(grammar, f"is not valid: {_first_line(error)}") from error
        if matcher.is_error():
            raise _refused(grammar, f"is not valid: {_first_line(matcher.get_error())}")
        return matcher

    def _llguidance(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                self._tokenizer = LLTokenizer(
                    self._tokenizer_json,
                    n_vocab=self._vocab_size,
                    eos_token=list(self._end_token_ids),
                )
            return self._tokenizer


class Constraint:
    """A grammar in progress, for one answer. See TokenConstraint."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_token_ids = end_token_ids
        self._ended = False

    def copy(self) -> Constraint:
        """The same state for another answer."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size, self._end_token_ids)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """True for each token that may come next. Raises ValueError when the grammar broke."""
        if self._ended:
            mask = np.zeros(self._vocab_size, np.bool_)
            mask[list(self._end_token_ids)] = True
            return mask
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def accept(self, token_id: int) -> None:
        """Go on by a token. Raises ValueError when the grammar does not allow it."""
        if self._ended:
            return
        if token_id in self._end_token_ids and self._matcher.is_accepting():
            self._ended = True
            return
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar failed: {_first_line(self._matcher.get_error())}")


class AfterReasoning:
    """A grammar for the answer of a model that may think first: reasoning is free.

    An answer that does not begin with the model's marker of reasoning must match from its start.
    """

    def __init__(self, inner: Constraint, begin_id: int, end_id: int, *, inside: bool) -> None:
        """begin_id, end_id: tokens around reasoning. inside: the prompt has opened it."""
        self._inner = inner
        self._marks = begin_id, end_id
        self._state: Literal["begin", "inside", "after"] = "inside" if inside else "begin"

    def copy(self) -> AfterReasoning:
        """The same, at its beginning, for another answer."""
        inside = self._state == "inside"
        return AfterReasoning(self._inner.copy(), *self._marks, inside=inside)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """True for each token that may come next. Raises ValueError when the grammar broke."""
        mask = self._inner.allowed()
        if self._state == "inside":
            mask[:] = True
        elif self._state == "begin":
            mask[self._marks[0]] = True
        return mask

    def accept(self, token_id: int) -> None:
        """Go on by a token. Raises ValueError when the grammar does not allow it."""
        if self._state == "inside":
            self._state = "after" if token_id == self._marks[1] else "inside"
        elif self._state == "begin" and token_id == self._marks[0]:
            self._state = "inside"
        else:
            self._state = "after"
            self._inner.accept(token_id)


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises what its converters raise."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        is_lark = "start:" in grammar.text
        return LLMatcher.grammar_from_lark(grammar.text if is_lark else any_to_lark(grammar.text))
    options: Mapping[str, Any] = {"whitespace_pattern": _JSON_SPACE}
    if grammar.compact:
        options = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(grammar.text, overrides=options)  # type: ignore[arg-type]


def _refused(grammar: Grammar, message: str) -> RequestError:
    return RequestError(400, "invalid_value", f"{grammar.param} {message}.", grammar.param)


def _first_line(error: object) -> str:
    """The telling part of llguidance's reports, which may quote the whole grammar."""
    return str(error).strip().split("\n", 1)[0][:200].rstrip(".")
