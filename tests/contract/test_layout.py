"""The outer folders are not packages, and the halves load none of each other's heavy parts."""

import operator
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "folder", ["operator", "worker", "tests", "tests/operator", "tests/worker"]
)
def test_outer_folders_hold_no_init(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_import_operator_is_the_standard_library() -> None:
    assert operator.__file__ is not None
    assert "tilefleet" not in operator.__file__
    inside = subprocess.run(
        [sys.executable, "-c", "import operator; print(operator.add(1, 1))"],
        cwd=ROOT / "operator", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert inside.stdout == "2\n"
