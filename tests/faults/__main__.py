"""python -m tests.faults: the sweep as a program; see sweep.py."""

import argparse
import asyncio
import sys

from tests.faults.sweep import FAULTS, run, whole


def main() -> int:
    parser = argparse.ArgumentParser(description="Every fault at every write of a fleet's life.")
    parser.add_argument(
        "--faults", default=",".join(FAULTS), help=f"which, by comma; default all: {FAULTS}"
    )
    parser.add_argument("--writes", default="", help="at which, by comma; default: at each")
    arguments = parser.parse_args()
    faults = arguments.faults.split(",")
    unknown = set(faults) - set(FAULTS)
    if unknown:
        parser.error(f"--faults {','.join(sorted(unknown))}: not among {', '.join(FAULTS)}")
    points = [int(number) for number in filter(None, arguments.writes.split(","))]
    return 0 if whole(asyncio.run(run(faults, points))) else 1


if __name__ == "__main__":
    sys.exit(main())
