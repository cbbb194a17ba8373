"""Stop strings across token boundaries: what may be shown, what waits, where the answer ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string is complete; never shows part of one.

    The match that is complete first ends the answer, the longest if several end at the same
    character, so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """stops: non-empty stop strings; none at all makes this a pass-through.

        include: show the stop string that ended the answer.
        """
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that may be shown now. Nothing after a match."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        cut = self._find(held)
        if cut is None:
            cut = len(held) - self._longest_open_prefix(held)
            self._held = held[cut:]
        else:
            self._held = ""
        return held[:cut]

    def finish(self) -> str:
        """The text still held back when the answer ends without a match."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Where the text before the first complete stop string ends, or None."""
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not hits:
            return None
        end, at, self.matched = min(hits)
        return end if self._include else at

    def _longest_open_prefix(self, text: str) -> int:
        """Characters at the end of the text that could be the beginning of a stop string."""
        for size in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
