"""What every command prints with: tables, JSON, ages, and colour where a person looks on.

It does not know what is shown.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

_COLOURS = {"good": "32", "bad": "31", "warn": "33", "faint": "2", "bold": "1"}
Row = Sequence[str]


def coloured(stream: IO[str] | None = None) -> bool:
    """Whether to colour: only on a terminal, and not against NO_COLOR or TERM=dumb."""
    stream = stream or sys.stdout
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str) -> str:
    """The text in a colour (good, bad, warn, faint, bold), plain where colours do not belong."""
    return f"\033[{_COLOURS[colour]}m{text}\033[0m" if text and coloured() else text


def table(rows: Sequence[Row], colours: Mapping[str, str] | None = None) -> list[str]:
    """Lines with every column but the last as wide as its widest cell; the first row is a header.

    colours: text of a cell → its colour; padding is not coloured, so columns stay in line.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for column, cell in enumerate(row):
            colour = "bold" if number == 0 else (colours or {}).get(cell)
            padding = " " * (widths[column] - len(cell)) if column < len(widths) else ""
            cells.append((paint(cell, colour) if colour else cell) + padding)
        lines.append("  ".join(cells).rstrip())
    return lines


def dump(shown: Any) -> str:
    """The machine's form of what a command shows."""
    return json.dumps(shown, indent=2)


def lines(*blocks: Iterable[str]) -> str:
    """Blocks of lines with an empty line between those that are not empty."""
    return "\n\n".join("\n".join(block) for block in map(list, blocks) if block)


def duration(seconds: float) -> str:
    """An age as kubectl writes it: 42s, 7m, 7m5s below ten minutes, 3h, 2d."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    if whole < 600:
        return f"{whole // 60}m{whole % 60}s" if whole % 60 else f"{whole // 60}m"
    if whole < 7200:
        return f"{whole // 60}m"
    return f"{whole // 3600}h" if whole < 172_800 else f"{whole // 86_400}d"
