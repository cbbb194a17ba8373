"""Programs of the clients' own environment (locks/clients.txt), run to their end."""

import os
import subprocess
from pathlib import Path

import pytest

BIN = Path(__file__).parents[4] / ".venv-clients" / "bin"
# Nothing here may ask a hub, an index of prices or a collector of statistics.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_API_KEY": "k",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(program: str, *arguments: object, folder: Path | None = None) -> str:
    """Output of a program, which must succeed. folder: where it runs."""
    if not (BIN / "python").exists():
        pytest.fail("the clients are not installed: run `make test-clients`")
    command = [str(BIN / program), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | QUIET, cwd=folder, timeout=1700
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
