"""``kubectl tilefleet drain``: one replica finishes its requests and leaves; another comes."""

import argparse
import asyncio
import time
from typing import Any

from tilefleet_operator.actions import DRAIN_FIELD_MANAGER
from tilefleet_operator.cli.connection import Connection, connect
from tilefleet_operator.cli.fleets import fleet
from tilefleet_operator.draining import order
from tilefleet_operator.errors import ConfigInvalid
from tilefleet_operator.observed import (
    ACTIVE,
    PodView,
    WorkerStats,
)
from tilefleet_operator.resources import PODS
from tilefleet_operator.units import seconds

_LOOK_SECONDS = 1.0


def add(commands: Any, flags: argparse.ArgumentParser) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "drain",
        parents=[flags],
        help="let one replica finish its requests and leave; the operator replaces it",
        description="Takes the replica out of the Service at once. The operator tells its worker"
        " to finish, deletes it when no request is left or after spec.rollout.drain.timeout, and"
        " creates another in its place. Exit status 1 when --wait ends before the pod does.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the fleet")
    parser.add_argument("pod", metavar="POD", help="one of its pods")
    parser.add_argument("--wait", action="store_true", help="until the pod is gone")
    parser.add_argument("--timeout", default="10m", metavar="DURATION",
                        help="of --wait; default: 10m")  # fmt: skip
    parser.set_defaults(run=run)


async def run(arguments: argparse.Namespace) -> int:
    """Order it, and watch it leave if asked to."""
    limit = wait_seconds(arguments.timeout)
    async with connect(arguments) as connection:
        view = await fleet(connection, arguments.name)
        pod = view.pod(arguments.pod)
        if view.deployment.spec.paused:
            raise ConfigInvalid(
                f"{arguments.name} is paused, nothing would replace {pod.name}; run: kubectl"
                f" tilefleet rollout resume {arguments.name}"
            )
        if pod.terminating or pod.state != ACTIVE:
            print(f"{pod.name} is leaving already")
        else:
            await connection.api.apply(PODS, order(pod, time.time()),
                                       field_manager=DRAIN_FIELD_MANAGER)  # fmt: skip
            print(f"{pod.name} drains")
        return await _wait(connection, arguments.name, pod, limit) if arguments.wait else 0


def wait_seconds(duration: str) -> float:
    """Seconds of a --timeout. Raises ConfigInvalid."""
    try:
        return seconds(duration)
    except ValueError as error:
        raise ConfigInvalid(f"--timeout: {error}") from error


async def _wait(connection: Connection, name: str, pod: PodView, limit: float) -> int:
    end, said = time.monotonic() + limit, ""
    while time.monotonic() < end:
        view = await fleet(connection, name)
        left = [one for one in view.pods if one.uid == pod.uid]
        if not left:
            print(f"{pod.name} is gone")
            return 0
        stats = (await connection.stats(left)).get(pod.uid)
        text = f"{stats.inflight} requests left" if isinstance(stats, WorkerStats) else "ending"
        if text != said:
            print(f"{pod.name}: {text}")
            said = text
        await asyncio.sleep(_LOOK_SECONDS)
    print(f"{pod.name} is still there after {limit:g} s")
    return 1
