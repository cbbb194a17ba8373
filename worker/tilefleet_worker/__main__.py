"""Command line of the worker: `python -m tilefleet_worker serve --model … `."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

_USAGE = """usage: python -m tilefleet_worker serve --model URI [flags]
       python -m tilefleet_worker serve --help
       python -m tilefleet_worker kernels [--arch gfx942] [--output json]
       python -m tilefleet_worker kernels build --arch gfx942 --cache FOLDER [--model NAME|FOLDER]
       python -m tilefleet_worker roofline [--model NAME|FOLDER] [--accelerator MI300X]
       python -m tilefleet_worker bench --model FOLDER [--concurrency 1 4 16 64] [flags of serve]
       python -m tilefleet_worker version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. 2 means that the command line is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command == "serve":
        return _serve(rest)
    if command == "rank":
        from tilefleet_worker.rank_process import rank_process

        return rank_process(rest)
    if command == "kernels":
        from tilefleet_worker.compilation.command import kernels

        return kernels(rest)
    if command == "roofline":
        from tilefleet_worker.roofline.command import roofline

        return roofline(rest)
    if command == "bench":
        from tilefleet_worker.bench.command import bench

        return bench(rest)
    if command == "version" and not rest:
        from tilefleet_worker.server.model_api import version

        print(version())
        return 0
    if command in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    what = f"{command!r} is not a command" if command else "a command is missing"
    print(f"error: {what}\n{_USAGE}", end="", file=sys.stderr)
    return 2


def _serve(flags: list[str]) -> int:
    # Flags first: a wrong one is reported before the server's libraries are imported.
    from tilefleet_worker.config import parse_args

    config = parse_args(flags)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("uvicorn", "httpx", "httpx2", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from tilefleet_worker.server.serve import serve

    return serve(config)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    # Not sys.exit: a start thread may be inside an import or a kernel that cannot be interrupted.
    os._exit(status)
