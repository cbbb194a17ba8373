"""python -m tests.faults: the sweep as a program; see sweep.py."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from tests.faults.life import STAGES
from tests.faults.operators import LEASE_SECONDS
from tests.faults.results import Point, Results, whole
from tests.faults.sweep import FAULTS, LANES, run


def _points(text: str) -> list[Point]:
    found = []
    for one in filter(None, text.split(",")):
        stage, _, number = one.partition(":")
        if stage not in STAGES:
            raise argparse.ArgumentTypeError(f"{one}: no stage of {', '.join(STAGES)}")
        found.append(Point(stage, int(number)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Every fault at every write of a fleet's life.")
    parser.add_argument(
        "--faults", default=",".join(FAULTS), help=f"which, by comma; default all: {FAULTS}"
    )
    parser.add_argument(
        "--writes", default="", type=_points, metavar="STAGE:N,...",
        help=f"at which writes of which stages, 0 for the beginning; default: at each; {STAGES}",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, metavar="FILE",
        help="JSON lines; a sweep that was stopped goes on after the cases that stand in it",
    )  # fmt: skip
    parser.add_argument("--lanes", type=int, default=LANES, help="operators at a time")
    parser.add_argument(
        "--lease-seconds", type=float, default=LEASE_SECONDS,
        help="of the operators; more on a machine so busy that a request takes seconds",
    )  # fmt: skip
    arguments = parser.parse_args()
    faults = arguments.faults.split(",")
    unknown = set(faults) - set(FAULTS)
    if unknown:
        parser.error(f"--faults {','.join(sorted(unknown))}: not among {', '.join(FAULTS)}")

    async def until_stopped() -> bool:
        this = asyncio.current_task()
        assert this is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
        results = Results(arguments.results)
        return whole(
            await run(faults, arguments.writes, results, arguments.lanes, arguments.lease_seconds)
        )

    try:
        return 0 if asyncio.run(until_stopped()) else 1
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main())
