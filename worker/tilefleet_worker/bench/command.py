"""`python -m tilefleet_worker bench`: the engine measured under load, as a table or JSON lines."""

import argparse
import dataclasses
import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilefleet_worker.bench.cases import Case, curve, parse_lengths, rows
from tilefleet_worker.bench.load import Loader
from tilefleet_worker.bench.summary import Row, pareto, summarise
from tilefleet_worker.config import ServeConfig, add_flags, engine_config, usable_cpus
from tilefleet_worker.engine import Engine
from tilefleet_worker.errors import ConfigError, EngineError, WorkerError

LENGTHS, CONCURRENCY = ("1024:1024", "8192:1024"), (1, 4, 16, 64)


def bench(arguments: Sequence[str]) -> int:
    """Measure and print. Exit status 1 when a row failed, 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    try:
        price = _price(options.price, options.price_basis)
        cases = _cases(options)
        engine = _engine(options)
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found, skipped, failed = _measure(engine, cases, price)
    engine.stop()
    facts = _facts(engine, options.price, options.price_basis)
    if options.output == "json":
        print(json.dumps({"bench": "worker", "about": facts}))
        for row in found:
            print(json.dumps({"bench": "worker", **row.as_dict()}))
        for case, reason in (*skipped.items(), *failed.items()):
            name = "skipped" if case in skipped else "failed"
            print(json.dumps({"bench": "worker", "case": case, name: reason}))
    else:
        print(as_table(found, skipped | failed, facts), end="")
    return 1 if failed else 0


def _measure(
    engine: Engine, cases: Sequence[Case], price: float | None
) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """Rows, and why the other cases have none: too large for this engine, or failed."""
    loader = Loader(engine)
    found: list[Row] = []
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for case in cases:
        print(f"{case.name}: {case.requests} requests", file=sys.stderr, flush=True)
        try:
            load = loader.run(case)
        except ConfigError as error:
            skipped[case.name] = str(error)
        except EngineError as error:
            failed[case.name] = str(error)
            break  # what is still in flight would be taken for the next case's
        else:
            found.append(summarise(case, load, _device_bytes(engine), price))
    return _marked(found), skipped, failed


def _marked(found: Sequence[Row]) -> list[Row]:
    """The rows with those of each curve marked that no other one beats."""
    marked = list(found)
    curves: dict[str, list[int]] = {}
    for number, row in enumerate(found):
        if row.curve:
            curves.setdefault(row.case.split(" at ")[0], []).append(number)
    for mine in curves.values():
        best = pareto([(found[n].output_rate, found[n].user_rate) for n in mine])
        for n, is_best in zip(mine, best, strict=True):
            marked[n] = dataclasses.replace(found[n], pareto=is_best)
    return marked


def _engine(options: argparse.Namespace) -> Engine:
    """Built from the flags of `serve`, in this process: no HTTP and no text."""
    from tilefleet_worker.factory import build_engine

    given = vars(options)
    names = [item.name for item in dataclasses.fields(ServeConfig)]
    config = ServeConfig(**{name: given[name] for name in names if name in given})
    folder = Path(config.model.removeprefix("file://"))
    if not folder.is_dir():
        raise ConfigError(f"--model {config.model!r}: give a folder of this machine.")
    cpus = usable_cpus(os.cpu_count() or 1)
    return build_engine(folder, engine_config(config, num_cpus=cpus))


def _cases(options: argparse.Namespace) -> list[Case]:
    if options.scale < 1 or options.scale > 64:
        raise ConfigError(f"--scale is {options.scale}: give a number from 1 to 64.")
    lengths = [parse_lengths(text) for text in options.lengths or LENGTHS]
    scaled = [(max(1, p // options.scale), max(2, a // options.scale)) for p, a in lengths]
    if min(options.concurrency, default=0) < 1:
        raise ConfigError(f"--concurrency {options.concurrency}: give numbers from 1 on.")
    fixed = () if options.no_rows else rows(options.scale)
    return [*curve(scaled, options.concurrency), *fixed]


def _price(price: float | None, basis: str | None) -> float | None:
    if price is not None and not 0 < price < float("inf"):
        raise ConfigError(f"--price is {price}: give the dollars of an hour, above 0.")
    if price is not None and not basis:
        raise ConfigError(
            "--price without --price-basis: say whose price it is and of when, for example "
            "--price-basis 'list price, rented by the hour, 2026-11'."
        )
    return price


def _device_bytes(engine: Engine) -> int:
    if engine.info.device.get("kind") == "gpu":
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _facts(engine: Engine, price: float | None, basis: str | None) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    info = engine.info
    return {
        "measured": True,
        "device": dict(info.device),
        "torch": torch.__version__,
        "tilefleet": version("tilefleet"),
        "options": dict(info.config),
        "startup_seconds": dict(info.startup),
        "price_per_hour": price,
        "price_basis": basis,
    }


_HEAD = (
    "case", "requests", "tokens/s", "tokens/s a user", "decode tokens/s", "TTFT p50, p99 s",
    "TPOT p50 ms", "KV live / pool GB", "memory GB", "$/M output", "$/M all", "best",
)  # fmt: skip


def as_table(found: Sequence[Row], left_out: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Rows for readers, with what they were measured on."""
    lines = [_HEAD, tuple("-" * len(title) for title in _HEAD), *map(_cells, found)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(_HEAD))]
    body = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    device, options = facts["device"], facts["options"]
    head = f"Measured on {device['name']} ({device['arch']}), "
    head += f"backend {options['backend']}, {options['dtype']}."
    if facts["price_basis"]:
        head += f" Price: ${facts['price_per_hour']} an hour; basis: {facts['price_basis']}."
    rest = [f"{case}: not measured: {reason}" for case, reason in left_out.items()]
    return "\n".join([head, "", *body, *rest, ""])


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    return (
        row.case, f"{row.requests}", number(row.output_rate, 1), number(row.user_rate, 1),
        number(row.decode_rate, 1), f"{row.ttft.p50:.3f}, {row.ttft.p99:.3f}",
        number(row.tpot.p50 * 1e3, 2),
        f"{row.kv_live_bytes / 1e9:.3f} / {row.kv_pool_bytes / 1e9:.3f}",
        number(row.device_bytes / 1e9, 2), number(row.dollars_per_million_output, 3),
        number(row.dollars_per_million_total, 3), "*" if row.pareto else "",
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tilefleet_worker bench",
        description="Measure the engine in this process: curves of throughput against speed in a "
        "closed loop, with the lengths and loads of InferenceX, then fixed rows. Flags of `serve` "
        "apply; those of its HTTP side change nothing.",
        allow_abbrev=False,
    )
    own = parser.add_argument_group("what is measured")
    own.add_argument("--lengths", action="append", metavar="PROMPT:ANSWER",
        help=f"tokens of a curve, may be repeated (default: {' and '.join(LENGTHS)})")  # fmt: skip
    own.add_argument("--concurrency", type=int, nargs="+", default=list(CONCURRENCY), metavar="N",
        help="requests at the same time of each point (default: %(default)s)")  # fmt: skip
    own.add_argument("--no-rows", action="store_true", help="leave the fixed rows out")
    own.add_argument("--scale", type=int, default=1, metavar="N",
        help="divide all lengths by this, for small machines and models (default: 1)")  # fmt: skip
    own.add_argument("--price", type=float, metavar="DOLLARS", help="of the device and an hour")
    own.add_argument("--price-basis", metavar="TEXT",
        help="whose price it is and of when; needed with --price, shown with the cost")  # fmt: skip
    own.add_argument("-o", "--output", choices=("table", "json"), default="table",
        help="form of the answer")  # fmt: skip
    add_flags(parser)
    return parser
