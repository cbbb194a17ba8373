"""Text to token ids and back, piece by piece.

Knows the model's tokenizer files. Does not know requests, HTTP or the engine.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as FastTokenizer

from tilefleet_worker.chat_template import ChatTemplate
from tilefleet_worker.errors import ModelError

# A token that ends in the middle of a character decodes to U+FFFD; one character needs at most four
# byte tokens, so text that still ends in U+FFFD after that many is broken for good and is let go.
_MAX_HELD_TOKENS = 4
# SentencePiece spells bytes without a token of their own like this.
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


_CLASS = "PreTrainedTokenizerFast"
_SPECIAL = ("bos", "eos", "pad", "unk")
_FLAGS = ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces")


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text, in order."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete; valid UTF-8, possibly empty."""

    def finish(self) -> str:
        """What is still held back at the end of the answer."""


class Tokenizer:
    """The tokenizer of one model folder, with its chat template. Threads may share it."""

    def __init__(self, fast: FastTokenizer, settings: dict[str, Any], template: str | None) -> None:
        """fast: the parsed tokenizer.json. settings: tokenizer_config.json. template: Jinja."""
        self._fast = fast
        self._byte_level = _is_byte_level(fast)
        self._special_ids = frozenset(
            token_id for token_id, token in fast.get_added_tokens_decoder().items() if token.special
        )
        self._bytes_of: dict[int, bytes] = {}
        self.vocab_size = fast.get_vocab_size(with_added_tokens=True)
        self.longest_token_characters = max(map(len, fast.get_vocab()), default=1)
        self._settings = settings
        self.eos_token = _token_text(settings, "eos_token")
        self.bos_token = _token_text(settings, "bos_token")
        self.chat_template = None if template is None else self._template(template)

    def _template(self, source: str) -> ChatTemplate:
        return ChatTemplate(source, bos_token=self.bos_token, eos_token=self.eos_token)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a model folder.

        Raises ModelError when a file is missing, unreadable or not what its name says.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{path} is missing: the model folder needs a Hugging Face tokenizer.json"
            )
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for any damage
            raise ModelError(
                f"{path} is not a tokenizer of the tokenizers library: {error}"
            ) from error
        settings = _read_settings(folder / "tokenizer_config.json")
        return cls(fast, settings, _read_template(folder / "chat_template.jinja", settings))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token, or None when the tokenizer names none."""
        return None if not self.eos_token else self.token_id(self.eos_token)

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        text: str = self._fast.to_str()
        return text

    def facts(self) -> dict[str, Any]:
        """What tokenizer_config.json says of special tokens and templates, for clients.

        Not all of it: the file may name code and paths.
        """
        named = {f"{name}_token": _token_text(self._settings, f"{name}_token") for name in _SPECIAL}
        flags = {name: self._settings[name] for name in _FLAGS if name in self._settings}
        template = None if self.chat_template is None else self.chat_template.source
        return {
            "tokenizer_class": str(self._settings.get("tokenizer_class", _CLASS)),
            **{name: text or None for name, text in named.items()},
            **flags,
            "chat_template": template,
        }

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id beyond it."""
        return self._fast.id_to_token(token_id) or ""

    def token_id(self, token: str) -> int | None:
        """Id of the token that is spelled like this, or None."""
        found: int | None = self._fast.token_to_id(token)
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens spelled out in it count as such."""
        encoded: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return encoded

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, all at once; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh detokenizer for one answer."""
        kind = _ByteDetokenizer if self._byte_level else _WindowDetokenizer
        return kind(self, skip_special_tokens)

    def spelling(self, token_id: int) -> bytes:
        """Bytes of one token by itself, special ones spelled out; may be a part of a character."""
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and not self.is_special(token_id):
            return self.token_bytes(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def is_special(self, token_id: int) -> bool:
        """True for tokens without text, such as end-of-sequence, and ids beyond the vocabulary."""
        return token_id in self._special_ids or token_id >= self.vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token of a byte-level tokenizer; empty for special tokens."""
        found = self._bytes_of.get(token_id)
        if found is None:
            token = None if self.is_special(token_id) else self._fast.id_to_token(token_id)
            found = b"" if token is None else _decode_byte_level(token)
            self._bytes_of[token_id] = found
        return found


class _ByteDetokenizer:
    """Exact for byte-level tokenizers: bytes in, UTF-8 out, incomplete characters wait."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._token_bytes = tokenizer.token_bytes if skip_special_tokens else tokenizer.spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For other tokenizers: decodes a short window again and emits what the new tokens added.

    The window starts at the previous piece, never inside a character: decoders such as
    SentencePiece's treat the first token of a text differently (they drop its leading space).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = []
        for token_id in token_ids:
            if not (self._skips and self._tokenizer.is_special(token_id)):
                self._held.append(token_id)
                pieces.append(self._emit(final=False))
        return "".join(pieces)

    def finish(self) -> str:
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self._decode(self._context)
        after = self._decode(self._context + self._held)
        waits = after.endswith("�") and len(self._held) < _MAX_HELD_TOKENS
        if not self._held or (waits and not final):
            return ""
        self._context, self._held = self._held, []
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skips)


def _is_byte_level(fast: FastTokenizer) -> bool:
    decoder = json.loads(fast.to_str()).get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return [part.get("type") for part in parts] == ["ByteLevel"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes are themselves, others U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _decode_byte_level(token: str) -> bytes:
    """Bytes of one token text; a token outside the alphabet (an added one) is its own text."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} must hold one JSON object")
    return settings


def _read_template(path: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: its own file first, else `chat_template` of the settings."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(settings: dict[str, Any], name: str) -> str:
    """Text of a special token, which the settings hold as a text or as an object."""
    token = settings.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
