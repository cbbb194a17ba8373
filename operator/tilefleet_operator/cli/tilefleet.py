"""The command ``tilefleet``: ``run`` the operator, print the ``crd``, ``plan`` files."""

import argparse
from collections.abc import Sequence

from tilefleet_operator.cli import plan, run
from tilefleet_operator.cli.execution import execute


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for bad input, said on standard error."""
    return execute(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(
        prog="tilefleet", description="LLM inference fleets on AMD GPUs.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run.add(commands)
    crd = commands.add_parser("crd", help="print the CustomResourceDefinition", allow_abbrev=False)
    crd.set_defaults(command=_crd)
    plan.add(commands)
    return parser


def _crd(_: argparse.Namespace) -> int:
    from tilefleet_operator.crd import render

    print(render(), end="")
    return 0
