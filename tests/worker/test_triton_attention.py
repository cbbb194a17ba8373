"""The Triton kernels against an fp64 oracle, in Triton's interpreter: no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_attention_cases.py")


@pytest.mark.parametrize("kind", ["decode", "prefill", "invariance"])
def test_kernels_match_the_oracle_in_the_interpreter(kind: str) -> None:
    """The interpreter is chosen when Triton is imported, hence a process of its own."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(CASES), kind],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "checked" in run.stdout
