"""``kubectl tilefleet status``: all fleets, or one with every replica, its load and its why."""

import argparse
import asyncio
import time
from collections.abc import Mapping
from typing import Any

from tilefleet_operator.api import KIND
from tilefleet_operator.cli import output
from tilefleet_operator.cli.connection import Connection, connect
from tilefleet_operator.cli.fleets import FleetView, fleet, fleets, with_load
from tilefleet_operator.observed import ACTIVE, MissingStats, PodView, WorkerStats

_COLOURS = {
    "AllReplicasReady": "good", "ready": "good", "Failed": "bad", "crashed": "bad",
    "Starting": "warn", "starting": "warn", "pending": "warn", "draining": "faint",
    "leaving": "faint",
}  # fmt: skip
# Conditions whose True is bad; of all others False is.
_BAD_WHEN_TRUE = ("CapacityLimited", "Degraded")
_NEUTRAL = ("Progressing", "AutoscalingActive")


def add(commands: Any, flags: argparse.ArgumentParser) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "status",
        parents=[flags],
        help="all fleets, or one with every replica, its load and why it is not ready",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one fleet; default: all")
    parser.add_argument("-A", "--all-namespaces", action="store_true", help="of all namespaces")
    parser.add_argument(
        "--no-load", action="store_true", help="do not ask the workers (needs get on pods/proxy)"
    )
    parser.add_argument("-w", "--watch", action="store_true", help="repeat every 2 s")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table",
                        help="default: table")  # fmt: skip
    parser.set_defaults(run=run)


async def run(arguments: argparse.Namespace) -> int:
    """Print it once, or until interrupted."""
    async with connect(arguments) as connection:
        while True:
            print(await _shown(connection, arguments))
            if not arguments.watch:
                return 0
            await asyncio.sleep(2.0)


async def _shown(connection: Connection, arguments: argparse.Namespace) -> str:
    json = arguments.output == "json"
    if arguments.name:
        view = await fleet(connection, arguments.name, load=not arguments.no_load)
        shown = as_json(view, time.time())
        return output.dump(shown) if json else detail(shown)
    found, problems = await fleets(connection, arguments.all_namespaces)
    if not arguments.no_load and json:
        found = [await with_load(connection, view) for view in found]
    shown_all = [as_json(view, time.time()) for view in found]
    if json:
        return output.dump(shown_all)
    return output.lines(overview(shown_all), problems)


def as_json(view: FleetView, now: float) -> dict[str, Any]:
    """Everything that the tables show. now: seconds since the epoch."""
    status, ready = view.status, view.condition("Ready")
    return {
        "namespace": view.deployment.namespace,
        "name": view.deployment.name,
        "mode": view.deployment.spec.autoscaling.mode,
        "desired": status.get("desiredReplicas"),
        "ready": status.get("readyReplicas"),
        "updated": status.get("updatedReplicas"),
        "revision": status.get("updateRevision"),
        "tokensPerSecond": (status.get("demand") or {}).get("tokensPerSecond"),
        "utilization": status.get("utilization"),
        "reason": ready.get("reason", "NotObserved"),
        "why": _why_fleet(view),
        "ageSeconds": round(now - view.created),
        "replicas": [_replica(view, pod, now) for pod in view.pods],
        "conditions": list(status.get("conditions") or ()),
    }


def _why_fleet(view: FleetView) -> str:
    """What is not as it should be, the most telling condition first; empty when all is well."""
    if not view.status:
        return "the operator has not seen it yet"
    if view.status.get("observedGeneration") != view.deployment.generation:
        return "the operator has not seen the last change yet"
    for kind in ("SpecValid", "Degraded", "CapacityLimited", "AcceleratorMatched", "Ready"):
        condition = view.condition(kind)
        if condition.get("status") == ("True" if kind in _BAD_WHEN_TRUE else "False"):
            return f"{condition['reason']}: {condition['message']}"
    progress = view.condition("Progressing")
    return str(progress["message"]) if progress.get("status") == "True" else ""


def _replica(view: FleetView, pod: PodView, now: float) -> dict[str, Any]:
    stats = view.stats.get(pod.uid)
    return {
        "name": pod.name,
        "state": state(pod),
        "revision": pod.revision,
        "current": pod.revision == view.status.get("updateRevision"),
        "node": pod.node,
        "restarts": pod.restarts,
        "ageSeconds": round(now - pod.created),
        "load": _load(stats),
        "why": _why_pod(view, pod, stats),
    }


def state(pod: PodView) -> str:
    """One word: ready, starting, pending, draining, leaving or crashed."""
    if pod.terminating:
        return "leaving"
    if pod.finished or pod.reason == "CrashLoopBackOff":
        return "crashed"
    if pod.state != ACTIVE:
        return "draining"
    if pod.ready:
        return "ready"
    return "starting" if pod.node else "pending"


def _load(stats: WorkerStats | MissingStats | None) -> dict[str, Any] | None:
    if not isinstance(stats, WorkerStats):
        return None
    gauges = stats.gauges
    used = gauges.kv_blocks_used / gauges.kv_blocks_total if gauges.kv_blocks_total else 0.0
    return {"running": gauges.running, "waiting": gauges.waiting, "kvUsed": round(used, 3)}


def _why_pod(view: FleetView, pod: PodView, stats: WorkerStats | MissingStats | None) -> str:
    parts = []
    if pod.state != ACTIVE and isinstance(stats, WorkerStats):
        parts.append(f"{stats.inflight} requests left")
    elif not pod.ready and (pod.reason or pod.message):
        parts.append(": ".join(text for text in (pod.reason, pod.message) if text))
    elif not pod.ready and isinstance(stats, WorkerStats) and stats.startup:
        parts.append(f"start-up: {stats.startup[-1][0]}")
    newest = view.status.get("updateRevision")
    if newest and pod.revision != newest:
        parts.append(f"outdated, {newest} is current")
    if pod.ready and isinstance(stats, MissingStats):
        parts.append(stats.reason)
    return "; ".join(parts)


_OVERVIEW = (
    "namespace", "name", "mode", "desired", "ready", "updated", "tokensPerSecond", "utilization",
    "reason",
)  # fmt: skip


def overview(shown: list[dict[str, Any]]) -> list[str]:
    """The table of all fleets."""
    if not shown:
        return [f"no {KIND}; create one, or look elsewhere with -n or -A"]
    rows = [["NAMESPACE", "NAME", "MODE", "DESIRED", "READY", "UPDATED", "TOK/S", "UTIL",
             "STATUS", "AGE", "WHY"]]  # fmt: skip
    for one in shown:
        cells = ["-" if one[key] is None else str(one[key]) for key in _OVERVIEW]
        rows.append([*cells, output.duration(one["ageSeconds"]), one["why"]])
    return output.table(rows, _COLOURS)


def detail(shown: Mapping[str, Any]) -> str:
    """One fleet: title, replicas, and the conditions that are not as they should be."""
    size = f"{shown['ready'] or 0} of {shown['desired']} replicas ready"
    title = (
        f"{shown['namespace']}/{shown['name']}: {size}, mode {shown['mode']},"
        f" revision {shown['revision']}, {output.duration(shown['ageSeconds'])} old"
    )
    rows = [("REPLICA", "STATE", "REVISION", "NODE", "RUNNING", "WAITING", "KV", "RESTARTS",
             "AGE", "WHY")]  # fmt: skip
    for pod in shown["replicas"]:
        load = pod["load"]
        figures = (
            (str(load["running"]), str(load["waiting"]), f"{load['kvUsed']:.0%}")
            if load is not None
            else ("-", "-", "-")
        )
        rows.append((pod["name"], pod["state"], pod["revision"], pod["node"] or "-", *figures,
                     str(pod["restarts"]), output.duration(pod["ageSeconds"]),
                     pod["why"]))  # fmt: skip
    replicas = output.table(rows, _COLOURS) if len(rows) > 1 else ["no replica"]
    notes = [
        f"{c['type']}: {c['reason']}: {c['message']}"
        for c in shown["conditions"]
        if c["type"] not in _NEUTRAL
        and c["status"] == ("True" if c["type"] in _BAD_WHEN_TRUE else "False")
    ]
    return output.lines([title, *replicas], notes or [shown["why"] or "nothing is wrong"])
