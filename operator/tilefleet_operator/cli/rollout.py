"""``kubectl tilefleet rollout``: watch a change of revision, pause it, resume it, undo it."""

import argparse
import asyncio
import time
from typing import Any

from tilefleet_operator.api import API_VERSION, KIND
from tilefleet_operator.cli import revisions
from tilefleet_operator.cli.connection import FIELD_MANAGER, connect
from tilefleet_operator.cli.drain import wait_seconds
from tilefleet_operator.cli.fleets import FleetView, fleet
from tilefleet_operator.resources import DEPLOYMENTS


def add(commands: Any, flags: argparse.ArgumentParser) -> None:
    """Add the command, with its sub-commands and flags."""
    parser = commands.add_parser(
        "rollout", help="watch, pause, resume or undo a change of revision", allow_abbrev=False
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    status = _action(
        actions, "status", flags, "how far it is; exit status 1 while it is not complete"
    )
    status.add_argument("-w", "--watch", action="store_true", help="until it is complete")
    status.add_argument("--timeout", default="10m", metavar="DURATION",
                        help="of --watch; default: 10m")  # fmt: skip
    status.set_defaults(run=_status)
    for name, paused in (("pause", True), ("resume", False)):
        text = f"set spec.paused to {str(paused).lower()}: the operator changes " + (
            "no pod any more" if paused else "pods again"
        )
        _action(actions, name, flags, text).set_defaults(run=_pause, paused=paused)
    revisions.add(actions, flags)


def _action(
    actions: Any, name: str, flags: argparse.ArgumentParser, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, parents=[flags], help=text, description=text.capitalize() + ".", allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME", help="the fleet")
    return parser


async def _status(arguments: argparse.Namespace) -> int:
    end, said = time.monotonic() + wait_seconds(arguments.timeout), ""
    async with connect(arguments) as connection:
        while True:
            done, text = progress(await fleet(connection, arguments.name))
            if text != said:
                print(f"{arguments.name}: {text}", flush=True)
                said = text
            if done or not arguments.watch or time.monotonic() >= end:
                return 0 if done else 1
            await asyncio.sleep(1.0)


def progress(view: FleetView) -> tuple[bool, str]:
    """Whether every wanted replica is ready with the newest revision, and what there is to say."""
    status = view.status
    if status.get("observedGeneration") != view.deployment.generation:
        return False, "the operator has not seen the last change yet"
    if view.condition("SpecValid").get("status") == "False":
        return False, str(view.condition("SpecValid")["message"])
    desired, ready = status.get("desiredReplicas", 0), status.get("readyReplicas", 0)
    if view.condition("Progressing").get("reason") == "ProgressDeadlineExceeded":
        return False, str(view.condition("Progressing")["message"])
    if view.condition("Progressing").get("status") == "True":
        return False, _with_reason(view, str(view.condition("Progressing")["message"]))
    if ready < desired or status.get("updatedReplicas", 0) < desired:
        return False, _with_reason(view, f"{ready} of {desired} replicas are ready")
    return True, f"complete: {ready} replicas are ready with revision {status['updateRevision']}"


def _with_reason(view: FleetView, text: str) -> str:
    if view.deployment.spec.paused:
        return f"{text}; paused"
    for kind in ("Degraded", "CapacityLimited"):
        condition = view.condition(kind)
        if condition.get("status") == "True":
            return f"{text}; {condition['reason']}: {condition['message']}"
    return text


async def _pause(arguments: argparse.Namespace) -> int:
    async with connect(arguments) as connection:
        view = await fleet(connection, arguments.name)
        if view.deployment.spec.paused == arguments.paused:
            print(f"{arguments.name} is {'paused already' if arguments.paused else 'not paused'}")
            return 0
        await connection.api.apply(
            DEPLOYMENTS,
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "metadata": {
                    "name": arguments.name,
                    "namespace": connection.namespace,
                    "uid": view.deployment.uid,
                },
                "spec": {"paused": arguments.paused},
            },
            field_manager=FIELD_MANAGER,
        )
    print(f"{arguments.name} is {'paused' if arguments.paused else 'resumed'}")
    return 0
