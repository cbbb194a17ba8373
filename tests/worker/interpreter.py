"""Cases that run in Triton's interpreter, which is chosen when Triton is imported: in a process."""

import os
import subprocess
import sys
from pathlib import Path


def check_in_interpreter(script: str, *arguments: str, timeout_seconds: int = 280) -> None:
    """Run a script of cases of this folder; it must succeed and say that it checked something."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=timeout_seconds,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "checked" in run.stdout
