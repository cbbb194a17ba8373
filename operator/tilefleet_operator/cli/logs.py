"""``kubectl tilefleet logs``: the logs of all replicas of a fleet, each line with its replica."""

import argparse
import asyncio
import sys
from typing import Any

from tilefleet_operator.cli import output
from tilefleet_operator.cli.connection import Connection, connect
from tilefleet_operator.cli.drain import wait_seconds
from tilefleet_operator.cli.fleets import fleet
from tilefleet_operator.errors import ApiError
from tilefleet_operator.observed import PodView


def add(commands: Any, flags: argparse.ArgumentParser) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "logs",
        parents=[flags],
        help="logs of all replicas, each line with its replica",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the fleet")
    parser.add_argument("pod", nargs="?", metavar="POD", help="only this pod; default: all")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new lines")
    parser.add_argument("--tail", type=int, default=10, metavar="N",
                        help="last lines of each replica; -1: all; default: 10")  # fmt: skip
    parser.add_argument("--since", metavar="DURATION", help="only lines younger than this")
    parser.add_argument(
        "-p", "--previous", action="store_true", help="of the container before the last restart"
    )
    parser.set_defaults(run=run)


async def run(arguments: argparse.Namespace) -> int:
    """Print them; 1 when one of the pods has no log to show."""
    query = query_of(arguments)
    async with connect(arguments) as connection:
        view = await fleet(connection, arguments.name)
        pods = [view.pod(arguments.pod)] if arguments.pod else list(view.pods)
        jobs = (_copy(connection, pod, query, prefix=not arguments.pod) for pod in pods)
        if arguments.follow:
            results = await asyncio.gather(*jobs)
        else:
            results = [await job for job in jobs]
    return 0 if all(results) else 1


def query_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The API's parameters. Raises ConfigInvalid for a --since that is no duration."""
    query = {"container": "worker"}
    if arguments.tail >= 0:
        query["tailLines"] = str(arguments.tail)
    if arguments.follow:
        query["follow"] = "true"
    if arguments.previous:
        query["previous"] = "true"
    if arguments.since:
        query["sinceSeconds"] = str(max(1, int(wait_seconds(arguments.since))))
    return query


async def _copy(
    connection: Connection, pod: PodView, query: dict[str, str], *, prefix: bool
) -> bool:
    try:
        async for line in connection.log(pod.namespace, pod.name, query):
            print(f"{output.paint(pod.name, 'faint')} {line}" if prefix else line, flush=True)
    except ApiError as error:
        print(f"{pod.name}: {error.message}", file=sys.stderr)
        return False
    return True
