"""Log probabilities as OpenAI's clients and vLLM's read them: chat, completions, prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tilefleet_worker.request import TokenLogprob

if TYPE_CHECKING:
    from tilefleet_worker.tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    content = []
    for entry in entries:
        top = [_chat_token(tokenizer, token_id, value) for token_id, value in entry.top]
        content.append(
            _chat_token(tokenizer, entry.token_id, entry.logprob) | {"top_logprobs": top}
        )
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    spelling = tokenizer.spelling(token_id)
    text = spelling.decode("utf-8", "replace")
    return {"token": text, "logprob": logprob, "bytes": list(spelling)}


class CompletionLogprobs:
    """The `logprobs` object of a text choice, in pieces: it counts the offsets of its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def of(
        self, entries: Sequence[TokenLogprob], prompt: Sequence[int] = ()
    ) -> dict[str, list[Any]]:
        """The object of these tokens.

        prompt: its tokens, when the entries begin with those of the second one; the first token
        of a prompt has no probability and is reported with null.
        """
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if prompt:
            self._append(found, prompt[0], None, None)
        for entry in entries:
            top = {self._name(token_id): value for token_id, value in entry.top}
            # The chosen token last: of two tokens with one name its value must stand.
            top[self._name(entry.token_id)] = entry.logprob
            self._append(found, entry.token_id, entry.logprob, top)
        return found

    def _append(
        self,
        found: dict[str, list[Any]],
        token_id: int,
        logprob: float | None,
        top: Mapping[str, float] | None,
    ) -> None:
        found["tokens"].append(self._name(token_id))
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(top)
        found["text_offset"].append(self._offset)
        self._offset += len(self._tokenizer.spelling(token_id).decode("utf-8", "replace"))

    def _name(self, token_id: int) -> str:
        """The token's text; one that is a part of a character is spelled in bytes, as by OpenAI."""
        spelling = self._tokenizer.spelling(token_id)
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def prompt_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> list[Any]:
    """vLLM's `prompt_logprobs`: null for the first token, then an object by token id for each."""
    return [None, *(_by_id(tokenizer, entry) for entry in entries)]


def _by_id(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    ranked = {
        token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)
    } | {entry.token_id: (entry.logprob, entry.rank)}
    return {
        str(token_id): {
            "logprob": value,
            "rank": rank,
            "decoded_token": tokenizer.spelling(token_id).decode("utf-8", "replace"),
        }
        for token_id, (value, rank) in ranked.items()
    }
