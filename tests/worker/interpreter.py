"""Cases that run in Triton's interpreter, which is chosen when Triton is imported: in a process.

One process imports torch and Triton for all of them; each script runs in a fork of it, so that no
case sees what another one left behind. Run as a script, this file is that process: it takes
[output, script, *arguments] as a line of JSON and answers with the script's exit status.
"""

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
# A fork keeps only the thread that forks: libraries must have started no others.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@lru_cache
def interpreter() -> "subprocess.Popen[str]":
    """The process. It ends when it can read nothing more."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def check_in_interpreter(script: str, *arguments: str, timeout_seconds: int = 900) -> None:
    """Run a script of cases of this folder; it must succeed and say that it checked something."""
    process, answer = interpreter(), ""
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.NamedTemporaryFile("r+") as output:
        try:
            process.stdin.write(json.dumps([output.name, str(FOLDER / script), *arguments]) + "\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], timeout_seconds)[0]:
                answer = process.stdout.readline()
        finally:
            if not answer:  # too late, or the test's own time is over: the next one gets another
                os.killpg(process.pid, signal.SIGKILL)
                interpreter.cache_clear()
        said = output.read()
    assert answer == "0\n", f"exit status {answer!r}: {said[-6000:]}"
    assert "checked" in said


def run_forked(output: str, script: str, *arguments: str) -> int:
    """Exit status of a script in a child process that shares what is imported by now."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import tilefleet_worker.factory
    import tilefleet_worker.gpu_engine  # noqa: F401

    sys.path.insert(0, str(FOLDER))  # scripts share some of their cases
    for line in sys.stdin:
        print(run_forked(*json.loads(line)), flush=True)
