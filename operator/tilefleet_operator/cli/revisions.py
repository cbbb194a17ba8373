"""``kubectl tilefleet rollout history`` and ``undo``: what a fleet was, and the way back.

The operator records every revision and never writes a spec; undoing is the user's own edit.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

from tilefleet_operator import history
from tilefleet_operator.cli import output
from tilefleet_operator.cli.connection import Connection, connect
from tilefleet_operator.cli.fleets import FleetView, fleet
from tilefleet_operator.history import Revision
from tilefleet_operator.observed import LABEL_DEPLOYMENT
from tilefleet_operator.resources import DEPLOYMENTS, REVISIONS, path
from tilefleet_operator.units import timestamp


def add(actions: Any, flags: argparse.ArgumentParser) -> None:
    """Add both sub-commands to `rollout`."""
    shown = actions.add_parser(
        "history", parents=[flags], help="the recorded revisions", allow_abbrev=False
    )
    shown.add_argument("name", metavar="NAME", help="the fleet")
    shown.add_argument("-o", "--output", choices=("table", "json"), default="table",
                       help="default: table")  # fmt: skip
    shown.set_defaults(run=_history)
    back = actions.add_parser(
        "undo",
        parents=[flags],
        help="write the part of the spec that pods are made from as it was in an earlier revision",
        allow_abbrev=False,
    )
    back.add_argument("name", metavar="NAME", help="the fleet")
    back.add_argument(
        "--to-revision", type=int, default=0, metavar="NUMBER",
        help="as rollout history shows it; default: the one before the newest",
    )  # fmt: skip
    back.set_defaults(run=_undo)


async def _recorded(connection: Connection, view: FleetView) -> tuple[Revision, ...]:
    selector = f"{LABEL_DEPLOYMENT}={view.deployment.name}"
    found = await connection.api.list(REVISIONS, connection.namespace, label_selector=selector)
    children = {(REVISIONS.kind, body["metadata"]["name"]): body for body in found.items}
    return history.revisions(children, view.deployment.uid)


async def _history(arguments: argparse.Namespace) -> int:
    async with connect(arguments) as connection:
        view = await fleet(connection, arguments.name)
        rows = [_row(one, view.status, time.time()) for one in await _recorded(connection, view)]
    if arguments.output == "json":
        print(output.dump(rows))
        return 0
    header = ("NUMBER", "REVISION", "AGE", "MODEL", "IMAGE", "STATE")
    lines = [(str(r["number"]), *(str(r[name.lower()]) for name in header[1:])) for r in rows]
    print("\n".join(output.table([header, *lines])))
    return 0


def _row(one: Revision, status: Mapping[str, Any], now: float) -> dict[str, Any]:
    is_current = one.name == status.get("currentRevision")
    is_wanted = one.name == status.get("updateRevision")
    return {
        "number": one.number,
        "revision": one.name,
        "age": output.duration(now - timestamp(one.created)) if one.created else "",
        "model": (one.spec.get("model") or {}).get("uri", ""),
        "image": one.image,
        "state": "current" if is_current else "rolling out" if is_wanted else "",
        "spec": one.spec,
    }


async def _undo(arguments: argparse.Namespace) -> int:
    async with connect(arguments) as connection:
        view = await fleet(connection, arguments.name)
        known = await _recorded(connection, view)
        same = {"op": "test", "path": "/metadata/uid", "value": view.deployment.uid}
        operations = [same, *history.undo(known, arguments.to_revision)]
        where = path(DEPLOYMENTS, connection.namespace, arguments.name)
        await connection.json_patch(where, operations)
    back = history.recorded(known, arguments.to_revision)
    print(f"{arguments.name} has the spec of revision {back.name} (number {back.number}) again")
    if view.deployment.spec.paused:
        print(f"it is paused; go on with: kubectl tilefleet rollout resume {arguments.name}")
    return 0
