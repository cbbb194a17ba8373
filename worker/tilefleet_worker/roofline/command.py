"""`python -m tilefleet_worker roofline`: models on accelerators, as a table or JSON."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from tilefleet_worker.errors import ConfigError, WorkerError
from tilefleet_worker.roofline.accelerators import ACCELERATORS
from tilefleet_worker.roofline.prediction import FORMULA, Assumptions, Prediction, predict
from tilefleet_worker.roofline.shapes import costs_of, model_names

Rows = Mapping[str, Sequence[Prediction]]
"""Predictions by model."""


def roofline(arguments: Sequence[str]) -> int:
    """Print the predictions; return the exit status, 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    try:
        assumed = _assumptions(options)
        prices = _prices(options.price, options.price_basis)
        rows = {
            model: [
                row
                for name in options.accelerator or ACCELERATORS
                for row in predict(costs_of(model), ACCELERATORS[name], assumed, prices.get(name))
            ]
            for model in options.model or model_names()
        }
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output == "json":
        print(as_json(rows, assumed, options.price_basis))
    else:
        print(as_table(rows, assumed, options.price_basis))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tilefleet_worker roofline",
        description="Predict tokens per second, latency, memory and cost from bytes and FLOPs. "
        "Nothing is measured.",
    )
    add, shares = parser.add_argument, Assumptions()
    add("--model", action="append", metavar="NAME|FOLDER",
        help=f"one of {', '.join(model_names())}, or a folder with a config.json; may be repeated "
        "(default: all named ones)")  # fmt: skip
    add("--accelerator", action="append", choices=tuple(ACCELERATORS),
        help="may be repeated (default: all)")  # fmt: skip
    add("--bandwidth-share", type=float, default=shares.bandwidth, metavar="SHARE",
        help="of the peak that is reached (default: %(default)s)")  # fmt: skip
    add("--compute-share", type=float, default=shares.compute, metavar="SHARE",
        help="of the peak that is reached (default: %(default)s)")  # fmt: skip
    add("--memory-share", type=float, default=shares.memory, metavar="SHARE",
        help="of the device that weights and KV may take (default: %(default)s)")  # fmt: skip
    add("--price", action="append", default=[], metavar="ACCELERATOR=DOLLARS",
        help="of one device and hour; may be repeated")  # fmt: skip
    add("--price-basis", metavar="TEXT",
        help="whose price it is and of when; needed with --price, shown with the cost")  # fmt: skip
    add("-o", "--output", choices=("table", "json"), default="table", help="form of the answer")
    return parser


def _assumptions(options: argparse.Namespace) -> Assumptions:
    shares = {
        "--bandwidth-share": options.bandwidth_share,
        "--compute-share": options.compute_share,
        "--memory-share": options.memory_share,
    }
    for flag, share in shares.items():
        if not 0 < share <= 1:
            raise ConfigError(f"{flag} is {share}: give a share above 0 and up to 1.")
    return Assumptions(*shares.values())


def _prices(given: Sequence[str], basis: str | None) -> dict[str, float]:
    """Dollars an hour by accelerator."""
    if given and not basis:
        raise ConfigError(
            "--price without --price-basis: say whose price it is and of when, for example "
            "--price-basis 'list price, rented by the hour, 2026-11'."
        )
    prices = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            price = float(number)
        except ValueError:
            price = 0.0
        if name not in ACCELERATORS or not 0 < price < float("inf"):
            raise ConfigError(
                f"--price {text!r}: give ACCELERATOR=DOLLARS, an accelerator of "
                f"{', '.join(ACCELERATORS)} and a number above 0."
            )
        prices[name] = price
    return prices


def as_json(rows: Rows, assumed: Assumptions, basis: str | None) -> str:
    """One object: what was assumed, and a list of predictions."""
    answer = {
        "predicted": True,
        "formula": _formula(assumed),
        "assumptions": asdict(assumed),
        "price_basis": basis,
        "predictions": [
            {"model": model, **asdict(row)} for model, found in rows.items() for row in found
        ],
    }
    return json.dumps(answer, indent=1)


def _formula(assumed: Assumptions) -> str:
    return FORMULA.format(bandwidth=assumed.bandwidth, compute=assumed.compute)


_HEAD = (
    "model", "accelerator", "case", "context", "GB used", "most at once", "step ms", "tokens/s",
    "prompt s", "$/M tokens", "bound by",
)  # fmt: skip


def as_table(rows: Rows, assumed: Assumptions, basis: str | None) -> str:
    """For a terminal, with the formula above it."""
    lines: list[tuple[str, ...]] = [_HEAD]
    lines += [_cells(model, row) for model, found in rows.items() for row in found]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    body = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    head = f"Predicted, not measured. {_formula(assumed)}."
    if basis:
        head += f" Cost: output tokens at full load all the time; price basis: {basis}."
    return head + "\n\n" + "\n".join(body)


def _cells(model: str, row: Prediction) -> tuple[str, ...]:
    step = None if row.step_seconds is None else row.step_seconds * 1e3
    return (
        model, row.accelerator, row.case, f"{row.context:,}", f"{row.memory_bytes / 1e9:.1f}",
        f"{row.largest_batch:,}", _number(step, 2), _number(row.tokens_per_second, 0),
        _number(row.prefill_seconds, 3), _number(row.dollars_per_million, 3), row.bound,
    )  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
