"""The last words of a process: one line in the file that Kubernetes shows as termination message.

The operator reads it from the pod's status and says it on the InferenceDeployment, so that a wrong
model path is a sentence there and not only a restart count. Knows no configuration and no engine.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

PATH = Path("/dev/termination-log")
# The kubelet keeps 4096 bytes; a status and an event need less.
_MAX_CHARACTERS = 1000


def write(error: BaseException) -> None:
    """Write `<class of the error>: <its message>` on one line.

    Outside Kubernetes the file does not exist; it is never created, and a failure is not an error.
    """
    line = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_CHARACTERS]
    with contextlib.suppress(OSError), PATH.open("r+b") as file:
        file.write(line.encode())
        file.truncate()
