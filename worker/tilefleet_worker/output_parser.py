"""The parts of an answer: what is said, what is thought, and what is called, as text arrives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A tool call: its place among the calls of the answer, and the function's name."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A further piece of the JSON text of a call's arguments."""

    index: int
    text: str


Part = Said | Thought | CallBegins | CallArguments


class OutputParser(Protocol):
    """Reads one answer. The parts do not depend on how the text was cut into pieces."""

    def push(self, text: str) -> list[Part]:
        """Parts that this text completes."""
        ...

    def finish(self) -> list[Part]:
        """What is still held back at the end of the answer."""
        ...


class Plain:
    """No structure: everything is said."""

    def push(self, text: str) -> list[Part]:
        """The text."""
        return [Said(text)] if text else []

    def finish(self) -> list[Part]:
        """Nothing is held back."""
        return []


class Chain:
    """Reasoning first, then the rest by a parser of its own."""

    def __init__(self, thinking: OutputParser, saying: OutputParser) -> None:
        self._thinking = thinking
        self._saying = saying

    def push(self, text: str) -> list[Part]:
        """Parts of both."""
        return self._resolve(self._thinking.push(text))

    def finish(self) -> list[Part]:
        """What either still holds back."""
        return self._resolve(self._thinking.finish()) + self._saying.finish()

    def _resolve(self, parts: Iterable[Part]) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            found += self._saying.push(part.text) if isinstance(part, Said) else [part]
        return found


def open_prefix(text: str, marker: str) -> int:
    """Characters at the end of the text that could be the beginning of the marker."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
