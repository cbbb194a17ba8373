"""From a load's timelines to the figures of its row. Pure.

Formulas. TTFT: first token less submission. TPOT: (last token less first) / (tokens - 1). ITL:
between tokens one after another. Tokens/s of a user: 1 / median TPOT. Decode tokens/s: tokens that
came while all requests of a batch were answering, from the last first token to the first last one.
Cost of a million tokens: price of an hour / (tokens/s · 3600 / 10⁶), at this load all the time.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from tilefleet_worker.bench.cases import Case
from tilefleet_worker.bench.load import Load, Timeline
from tilefleet_worker.price import dollars_per_million


@dataclass(frozen=True, slots=True)
class Spread:
    """Of values in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value; a percentile is the value at or above that share of them."""
        ranked = sorted(values)

        def at(percent: int) -> float:
            return ranked[max(0, -(-len(ranked) * percent // 100) - 1)]

        return cls(mean(ranked), at(50), at(90), at(99))


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one case. Rates are tokens a second of one device."""

    case: str
    concurrency: int
    requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_rate: float
    total_rate: float
    user_rate: float
    decode_rate: float | None
    """None when the requests never answered all at once."""
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2e: Spread
    kv_live_bytes: int
    kv_pool_bytes: int
    device_bytes: int
    """That the process holds of the device's memory, or of the machine's at the most."""
    dollars_per_million_output: float | None
    dollars_per_million_total: float | None
    curve: bool
    pareto: bool = False
    """On the curve: no other point of these lengths has both more tokens/s and faster users."""

    def as_dict(self) -> Mapping[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def summarise(case: Case, load: Load, device_bytes: int, price: float | None) -> Row:
    """The row of a case. price: dollars of the device for an hour; None: no cost."""
    lines = load.timelines
    prompt = sum(line.prompt for line in lines)
    output = sum(len(line.arrivals) for line in lines)
    tpot = Spread.of([_tpot(line) for line in lines])
    gaps = [b - a for line in lines for a, b in itertools.pairwise(line.arrivals)]
    rate, total = output / load.seconds, (prompt + output) / load.seconds
    return Row(
        case.name, case.concurrency, len(lines), load.seconds, prompt, output, rate, total,
        1 / tpot.p50 if tpot.p50 else float(output) / load.seconds, _decode_rate(case, lines),
        Spread.of([line.arrivals[0] - line.began for line in lines]), tpot,
        Spread.of(gaps or [tpot.mean]),
        Spread.of([line.arrivals[-1] - line.began for line in lines]),
        load.kv_live_bytes, load.kv_pool_bytes, device_bytes,
        None if price is None else dollars_per_million(price, rate),
        None if price is None else dollars_per_million(price, total),
        case.curve,
    )  # fmt: skip


def _tpot(line: Timeline) -> float:
    return (line.arrivals[-1] - line.arrivals[0]) / max(1, len(line.arrivals) - 1)


def _decode_rate(case: Case, lines: Sequence[Timeline]) -> float | None:
    if len(lines) != case.concurrency:  # not one batch
        return None
    begin = max(line.arrivals[0] for line in lines)
    end = min(line.arrivals[-1] for line in lines)
    came = sum(begin < at <= end for line in lines for at in line.arrivals)
    return came / (end - begin) if end > begin else None


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: at least as large in both figures, and larger in one."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    return [not any(beats(other, point) for other in points) for point in points]
