"""Starts operators quickly: imports the operator once, then forks a process for each command.

    python launcher.py        one JSON object a line on standard input:
                              {"number": N, "argv": [...], "log": FILE, "clock": FILE or absent}

Each child runs the operator's own command line as ``python -m tilefleet_operator`` would; only the
2 s of imports are saved. Prints {"number": N, "pid": P} for each, and {"ended": P, "status": S} at
its end. clock: how far the child's wall clock is off; needs the clock shim preloaded.
"""

import ctypes
import json
import os
import random
import select
import signal
import time
import traceback
from contextlib import suppress

import kubernetes.config  # noqa: F401  (what `run` loads late)

from tilefleet_operator import process  # noqa: F401
from tilefleet_operator.cli.tilefleet import main as operator_main


def child(argv: list[str], log: str, clock: str | None) -> None:
    """Become one operator; never returns."""
    if clock is not None and ctypes.CDLL(None).clock_shim_follow(clock.encode()) != 0:
        os._exit(3)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    random.seed()
    status = 1
    try:
        status = operator_main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def say(**what: int) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    buffer = b""
    alive: set[int] = set()
    try:
        while True:
            readable, _, _ = select.select([0], [], [], 0.05)
            if readable:
                data = os.read(0, 1 << 16)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    command = json.loads(line)
                    pid = os.fork()
                    if pid == 0:
                        child(command["argv"], command["log"], command.get("clock"))
                    alive.add(pid)
                    say(number=command["number"], pid=pid)
            for pid in list(alive):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    alive.discard(pid)
                    say(ended=pid, status=os.waitstatus_to_exitcode(status))
    finally:
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
