"""The split of reasoning from answer, for models that put `<think>` … `</think>` around it."""

from __future__ import annotations

from tilefleet_worker.output_parser import Part, Said, Thought, open_prefix

BEGIN, END = "<think>", "</think>"


def begins_inside(prompt_tail: str) -> bool:
    """True when the prompt itself opened the reasoning, as some templates do."""
    return prompt_tail.rfind(BEGIN) > prompt_tail.rfind(END)


class ThinkParser:
    """Reads reasoning at the beginning of an answer. What follows it is said.

    An answer that neither begins with the marker nor follows one in its prompt has no reasoning.
    """

    def __init__(self, *, inside: bool) -> None:
        """inside: the prompt opened the reasoning."""
        self._held = ""
        self._state = "think" if inside else "begin"
        self._steps = {
            "begin": self._begin,
            "think": self._think,
            "after": self._after,
            "answer": self._answer,
        }

    def push(self, text: str) -> list[Part]:
        """Parts that this text completes."""
        self._held += text
        parts: list[Part] = []
        while (step := self._steps[self._state]()) is not None:
            parts += step
        return parts

    def _begin(self) -> list[Part] | None:
        start = self._held.lstrip()
        if start.startswith(BEGIN):
            self._held, self._state = start[len(BEGIN) :], "think"
            return []
        if BEGIN.startswith(start):
            return None
        self._state = "answer"
        return []

    def _think(self) -> list[Part] | None:
        thought, found, rest = self._held.partition(END)
        if found:
            self._held, self._state = rest, "after"
        else:
            size = len(thought) - open_prefix(thought, END)
            thought, self._held = thought[:size], thought[size:]
        if thought:
            return [Thought(thought)]
        return [] if found else None

    def _after(self) -> list[Part] | None:
        """The line ends behind the marker belong to neither part."""
        self._held = self._held.lstrip("\n")
        if not self._held:
            return None
        self._state = "answer"
        return []

    def _answer(self) -> list[Part] | None:
        text, self._held = self._held, ""
        return [Said(text)] if text else None

    def finish(self) -> list[Part]:
        """The rest: a marker that never came was text of its part."""
        text, self._held = self._held, ""
        if not text:
            return []
        return [Thought(text) if self._state == "think" else Said(text)]
