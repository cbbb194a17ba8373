"""docs/architecture.md names modules and words that exist, so a reader finds the way."""

import json
import re
from pathlib import Path

import pytest

from tilefleet_operator.cli.tilefleet import main

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
OPERATOR, WORKER = (
    TEXT.split("## Path 1")[1].split("## Path 2")[0],
    TEXT.split("## Path 2")[1].split("## Words")[0],
)


@pytest.mark.parametrize(
    ("part", "package", "least"),
    [(OPERATOR, "operator/tilefleet_operator", 25), (WORKER, "worker/tilefleet_worker", 10)],
    ids=["operator", "worker"],
)
def test_every_module_in_the_tables_exists(part: str, package: str, least: int) -> None:
    rows = [line for line in part.splitlines() if line.startswith("|")]
    cells = [row.strip("|").split(" | ")[1] for row in rows if not row.startswith("|-")]
    named = {name for cell in cells for name in re.findall(r"`([a-z_]+)/?`", cell)}
    assert len(named) >= least
    for name in named - {"tilefleet_operator", "tilefleet_worker"}:
        module = ROOT / package / name
        assert module.with_suffix(".py").exists() or module.is_dir(), name


def test_the_plan_speaks_of_the_actions_that_the_architecture_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "-f", str(ROOT / "examples" / "cpu-tiny.yaml"), "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = {
        action["action"] for one in shown for step in one["steps"] for action in step["actions"]
    }
    assert found
    for word in found:
        assert f"`{word}`" in OPERATOR
    assert all(action["why"] for step in shown[0]["steps"] for action in step["actions"])
