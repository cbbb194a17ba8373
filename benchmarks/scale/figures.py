"""Figures of benchmarks/operator_scale.py, and the line that each becomes."""

import math
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Json = dict[str, Any]


@dataclass
class Figure:
    """One measured value and what it should be: at most the goal, or at least."""

    case: str
    value: float | None
    unit: str
    goal: float
    note: str = ""
    at_least: bool = False
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    @property
    def met(self) -> bool:
        """Whether it is as it should be; what was not reached is not."""
        if self.value is None:
            return False
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile; share 0..1. None without values, or where it is infinite."""
    ordered = sorted(values)
    found = ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.inf
    return found if math.isfinite(found) else None


def line(ours: Figure, theirs: Figure | None) -> Json:
    """The JSON line of one figure."""
    value, other = ours.value, theirs.value if theirs else None
    return {
        "bench": "operator_scale",
        "case": ours.case,
        "value": None if value is None else round(value, 3),
        "unit": ours.unit,
        "note": ours.note,
        "goal": ours.goal,
        "at_least": ours.at_least,
        "met": ours.met,
        "peer": theirs and "plain kopf operator",
        "peer_value": None if other is None else round(other, 3),
        "ratio": round(value / other, 3) if value is not None and other else None,
        "device": _device(),
        "commit": _commit(),
        "load_average": round(ours.load, 1),
    }


def _device() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores for the whole cluster"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
