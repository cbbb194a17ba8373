"""Starting, finding and ending processes, by their id and start time only."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kit.errors import KitError


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a command that must succeed.

    Raises KitError with the command and the end of its output if it fails or does not exist.
    """
    line = " ".join(str(part) for part in command)
    try:
        result = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=dict(environment) if environment is not None else None,
        )
    except FileNotFoundError:
        raise KitError(f"`{line}`: there is no {command[0]} on PATH; install it") from None
    if result.returncode != 0:
        raise KitError(f"`{line}` ended with {result.returncode}: {result.stdout[-2000:].strip()}")
    return result.stdout


def run_watched(
    command: Sequence[str | Path],
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    tick: Callable[[float], None],
) -> int:
    """Exit status of a long command in its own process group, output to a log file.

    tick gets the elapsed seconds about once a second. The whole group ends with us: an
    interrupt here ends the command and is passed on.
    """
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=1)
                tick(time.monotonic() - began)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if it is gone or a zombie.

    With the id this names one process for ever, however ids are reused.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name in parentheses may hold spaces; the fields after it do not.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def kill_and_wait(pid: int, ticks: int, timeout_seconds: float = 20.0) -> None:
    """SIGKILL one process, if it is still the one that began at `ticks`, and wait for its end.

    For the init of a process namespace the kernel first ends every process inside.
    Raises KitError if it is still there after the timeout.
    """
    deadline = time.monotonic() + timeout_seconds
    while start_ticks(pid) == ticks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise KitError(f"process {pid} did not end within {timeout_seconds:.0f} s of SIGKILL")
        time.sleep(0.05)
