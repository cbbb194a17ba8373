"""Figures of benchmarks/operator_scale.py, and the line that each becomes."""

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
    """One measured value and what it should be. below: smaller is better."""

    case: str
    value: float | None
    unit: str
    goal: float
    note: str = ""
    load: float = field(default_factory=lambda: os.getloadavg()[0])


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile; share 0..1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


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
        "met": value is not None and value <= ours.goal,
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
