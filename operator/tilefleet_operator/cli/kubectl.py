"""The kubectl plugin: ``kubectl tilefleet COMMAND``, found by the name of its program."""

import argparse
import asyncio
from collections.abc import Sequence

from tilefleet_operator.cli import drain, explain, logs, rollout, status, top
from tilefleet_operator.cli.connection import add_flags
from tilefleet_operator.cli.execution import execute

_EPILOG = """\
exit status: 0; 1 when the cluster refuses or what was waited for did not come; 2 for bad input
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return execute(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(
        prog="kubectl tilefleet",
        description="Look into fleets of InferenceDeployments and act on single replicas.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(flags)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (status, explain, drain, rollout, logs, top):
        module.add(commands, flags)
    parser.set_defaults(command=_run)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    code: int = asyncio.run(arguments.run(arguments))
    return code
