"""The command ``tilefleet``: ``run`` the operator, print the ``crd``, ``plan`` files."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from tilefleet_operator.cli import plan, run
from tilefleet_operator.errors import OperatorError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for bad input, said on standard error."""
    return execute(build_parser(), argv)


def execute(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, run the command, and say an error of ours in one line."""
    arguments = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except OperatorError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Nothing more may be flushed into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


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
