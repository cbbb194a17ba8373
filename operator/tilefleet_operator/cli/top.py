"""``kubectl tilefleet top``: what each replica does now, from two looks at its worker."""

import argparse
import asyncio
from collections.abc import Mapping
from typing import Any

from tilefleet_operator.cli import output
from tilefleet_operator.cli.connection import Connection, connect
from tilefleet_operator.cli.drain import wait_seconds
from tilefleet_operator.cli.fleets import FleetView, fleet, fleets
from tilefleet_operator.observed import MissingStats, WorkerStats


def add(commands: Any, flags: argparse.ArgumentParser) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "top",
        parents=[flags],
        help="tokens per second, requests and memory of each replica now",
        description="Asks each worker twice through the API server, which needs the verb get on"
        " pods/proxy, and shows the difference.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one fleet; default: all")
    parser.add_argument("-A", "--all-namespaces", action="store_true", help="of all namespaces")
    parser.add_argument("--interval", default="2s", metavar="DURATION",
                        help="between the two looks; default: 2s")  # fmt: skip
    parser.add_argument("-w", "--watch", action="store_true", help="repeat")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table",
                        help="default: table")  # fmt: skip
    parser.set_defaults(run=run)


async def run(arguments: argparse.Namespace) -> int:
    """Print it once, or until interrupted."""
    pause = max(0.1, wait_seconds(arguments.interval))
    async with connect(arguments) as connection:
        while True:
            shown = await _shown(connection, arguments, pause)
            print(output.dump(shown) if arguments.output == "json" else "\n".join(table(shown)))
            if not arguments.watch:
                return 0


async def _shown(
    connection: Connection, arguments: argparse.Namespace, pause: float
) -> list[dict[str, Any]]:
    if arguments.name:
        views = [await fleet(connection, arguments.name)]
    else:
        views, _ = await fleets(connection, arguments.all_namespaces)
    pods = [pod for view in views for pod in view.pods]
    before = await connection.stats(pods)
    await asyncio.sleep(pause)
    after = await connection.stats(pods)
    return [row for view in views for row in rows(view, before, after)]


def rows(
    view: FleetView,
    before: Mapping[str, WorkerStats | MissingStats],
    after: Mapping[str, WorkerStats | MissingStats],
) -> list[dict[str, Any]]:
    """One entry a replica; figures are null where a worker did not answer twice."""
    result = []
    for pod in view.pods:
        old, new = before.get(pod.uid), after.get(pod.uid)
        entry: dict[str, Any] = {
            "namespace": pod.namespace,
            "fleet": view.deployment.name,
            "replica": pod.name,
            "figures": None,
            "why": "",
        }
        if isinstance(old, WorkerStats) and isinstance(new, WorkerStats):
            entry["figures"] = figures(old, new)
        else:
            missing = new if isinstance(new, MissingStats) else old
            not_asked = "draining or starting" if pod.ip else "has no address yet"
            entry["why"] = missing.reason if isinstance(missing, MissingStats) else not_asked
        result.append(entry)
    return result


def figures(old: WorkerStats, new: WorkerStats) -> dict[str, float | None]:
    """Rates between two answers, per second; None where nothing happened to measure.

    A restart between the two makes the totals of the new process its growth.
    """
    restarted = new.uptime_seconds < old.uptime_seconds
    elapsed = new.uptime_seconds - (0.0 if restarted else old.uptime_seconds)

    def growth(key: str) -> float:
        start = 0.0 if restarted else float(getattr(old.counters, key))
        return float(getattr(new.counters, key)) - start

    computed, cached = growth("prompt_tokens_computed"), growth("prompt_tokens_cached")
    steps, gauges = growth("steps"), new.gauges
    seconds = max(elapsed, 1e-9)
    return {
        "outputTokensPerSecond": round(growth("generated_tokens") / seconds, 1),
        "promptTokensPerSecond": round(computed / seconds, 1),
        "requestsPerSecond": round(growth("arrivals") / seconds, 2),
        "cachedShare": round(cached / (computed + cached), 3) if computed + cached else None,
        "stepMilliseconds": round(1000 * growth("busy_seconds") / steps, 2) if steps else None,
        "running": gauges.running,
        "waiting": gauges.waiting,
        "oldestWaitSeconds": round(gauges.oldest_wait_seconds, 2),
        "kvUsedShare": round(gauges.kv_blocks_used / gauges.kv_blocks_total, 3)
        if gauges.kv_blocks_total
        else None,
    }


_COLUMNS = (
    ("OUT TOK/S", "outputTokensPerSecond"), ("PROMPT TOK/S", "promptTokensPerSecond"),
    ("REQ/S", "requestsPerSecond"), ("CACHED", "cachedShare"), ("STEP MS", "stepMilliseconds"),
    ("RUNNING", "running"), ("WAITING", "waiting"), ("OLDEST S", "oldestWaitSeconds"),
    ("KV", "kvUsedShare"),
)  # fmt: skip


def table(shown: list[dict[str, Any]]) -> list[str]:
    """The entries as a table."""
    if not shown:
        return ["no replica"]
    lines = [["FLEET", "REPLICA", *(title for title, _ in _COLUMNS), "WHY"]]
    for one in shown:
        found = one["figures"] or {}
        cells = [_cell(key, found.get(key)) for _, key in _COLUMNS]
        lines.append([one["fleet"], one["replica"], *cells, one["why"]])
    return output.table(lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0%}" if key.endswith("Share") else f"{value:g}"
