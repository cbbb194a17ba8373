"""`python -m tilefleet_worker kernels`: what the compiler makes of every kernel."""

import argparse
import sys
from collections.abc import Sequence

from tilefleet_worker.compilation.build_command import build_kernels
from tilefleet_worker.compilation.target_driver import ARCHITECTURES


def kernels(arguments: Sequence[str]) -> int:
    """Compile, print, and return the exit status."""
    if arguments[:1] == ["build"]:
        return build_kernels(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m tilefleet_worker kernels",
        description="Compile every kernel in every shipped configuration, without a GPU, and print"
        " registers, spills, shared memory, matrix instructions and loads.",
    )
    parser.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        action="append",
        help="architecture to compile for, may be repeated (default: all)",
    )
    parser.add_argument(
        "-o", "--output", choices=("markdown", "json"), default="markdown", help="form of the table"
    )
    options = parser.parse_args(arguments)
    from tilefleet_worker.compilation.page import as_json, as_markdown, reports

    print("compiling; on a cold cache this takes a minute or two", file=sys.stderr, flush=True)
    found = reports(tuple(options.arch or ARCHITECTURES))
    print(as_json(found) if options.output == "json" else as_markdown(found), end="")
    return 0
