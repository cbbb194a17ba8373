"""Texts with units, as Kubernetes and the API write them: durations, quantities, times."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

# Every plan of every fleet reads the same few texts again.
_remembered = lru_cache(maxsize=4096)
_DURATION = re.compile(r"(\d+)(ms|s|m|h)")
_DURATION_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)([numkKMGTPE]i?|)$")
_QUANTITY_FACTORS = {
    "": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "E": 1e18, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
    "Ei": 2.0**60,
}  # fmt: skip


@_remembered
def seconds(duration: str) -> float:
    """Seconds of a duration such as "1m30s" or "250ms". Raises ValueError on anything else."""
    parts = _DURATION.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise ValueError(f"{duration!r} is not a duration; write for example 300s, 1m30s or 250ms")
    return sum(int(number) * _DURATION_SECONDS[unit] for number, unit in parts)


@_remembered
def quantity(text: str | float) -> float:
    """Value of a Kubernetes quantity in its base unit: bytes, cores or devices.

    Raises ValueError on anything else.
    """
    match = _QUANTITY.match(str(text))
    if match is None or match.group(2) not in _QUANTITY_FACTORS:
        raise ValueError(f"{text!r} is not a quantity; write for example 2, 500m or 16Gi")
    return float(match.group(1)) * _QUANTITY_FACTORS[match.group(2)]


@_remembered
def timestamp(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time in UTC, with or without a fraction.

    Raises ValueError on anything else.
    """
    parsed = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def rfc3339(time: float) -> str:
    """RFC 3339 text, in UTC and whole seconds, of seconds since the epoch."""
    return datetime.fromtimestamp(int(time), tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
