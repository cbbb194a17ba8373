"""Runs one long command: its steps on the terminal with times, all of its output in a log file."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from inputs import ImageError

HEARTBEAT_SECONDS = 15


def say(message: str) -> None:
    """One line on standard output, at once."""
    print(message, flush=True)


def run(
    label: str, command: list[str], log: Path, environment: dict[str, str],
    interesting: Callable[[str], bool],
) -> float:  # fmt: skip
    """Seconds it took. Lines that are interesting are shown; silence gets a sign of life.

    Raises ImageError with the end of the log if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start, done = time.monotonic(), threading.Event()
    tail: list[str] = []
    shown: tuple[float, str] = (start, "working")  # time and text of the last line shown

    def heartbeat() -> None:
        nonlocal shown
        while not done.wait(1):
            now = time.monotonic()
            if now - shown[0] >= HEARTBEAT_SECONDS:
                shown = (now, shown[1])
                say(f"  {label} {now - start:5.0f} s  … {shown[1]}")

    threading.Thread(target=heartbeat, daemon=True).start()
    try:
        with (
            log.open("w") as sink,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", env={**os.environ, **environment}, start_new_session=True,
            ) as process,
        ):  # fmt: skip
            try:
                for line in process.stdout or ():
                    sink.write(line)
                    tail = [*tail[-29:], line]
                    if interesting(line):
                        shown = (time.monotonic(), " ".join(line.split())[:100])
                        say(f"  {label} {shown[0] - start:5.0f} s  {shown[1]}")
            except BaseException:  # Ctrl-C, say: what the command started ends with it
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise
    finally:
        done.set()
    if process.returncode:
        raise ImageError(f"{label} failed ({' '.join(command[:2])}); {log} ends:\n{''.join(tail)}")
    return time.monotonic() - start
