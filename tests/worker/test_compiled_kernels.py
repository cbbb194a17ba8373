"""Every kernel compiles for every architecture within the limits that its speed depends on: no GPU.

Limits: docs/reference/kernels.md says what the figures mean. The stored figures are of the Triton
that the lock pins; another one makes other code, so that a change of it shows here.
"""

import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import triton

from tilefleet_worker.compilation.page import as_markdown
from tilefleet_worker.compilation.report import Report
from tilefleet_worker.compilation.target_driver import ARCHITECTURES
from tilefleet_worker.compilation.variants import variants

pytestmark = pytest.mark.kernels

REFERENCE = Path(__file__).parents[2] / "docs/reference"
WORKER = Path(__file__).parents[2] / "worker/tilefleet_worker"
STORED: dict[str, Any] = json.loads((REFERENCE / "kernels.json").read_text())
MOST_LDS = {"gfx942": 64 << 10, "gfx950": 160 << 10, "sm90": 227 << 10}
REMEDY = (
    "if the change is meant, run `python -m tilefleet_worker kernels -o json >"
    " docs/reference/kernels.json` and the same without -o for kernels.md"
)


@lru_cache
def compiled(architecture: str) -> dict[str, Report]:
    """Reports of a fresh process: this one may have imported Triton for its interpreter."""
    command = [sys.executable, "-m", "tilefleet_worker", "kernels", "-o", "json"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [*command, "--arch", architecture], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {key: Report(**row) for key, row in json.loads(run.stdout)["kernels"].items()}


def family(key: str) -> str:
    """decode, prefill or another one."""
    return key.split()[1].rstrip(":")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_within_its_limits(architecture: str) -> None:
    for key, report in compiled(architecture).items():
        decode, attention = family(key) == "decode", family(key) in ("decode", "prefill")
        product = family(key) in ("expert_gate_and_up", "expert_down", "scaled_product", "few_rows")
        if product:
            assert (report.spills, report.scratch) == (0, 0), key
            assert report.matrix, key
            assert {"128", "128 async", "tile by TMA"} & report.loads.keys(), key
            assert not report.loads.get("16 or less"), key
        assert report.lds <= MOST_LDS[architecture], key
        assert report.spills <= (0 if decode else 4), key
        assert report.scratch <= (0 if decode else 16), key
        if not attention:
            continue
        assert report.loads.keys() & {"128", "128 async", "tile by TMA"}, key
        assert not report.loads.get("16 or less"), key
        matrix = "v_mfma_f32" if architecture.startswith("gfx") else "mma"
        assert report.matrix, key
        assert all((matrix in name and "bf16" in name) or "mma" in name for name in report.matrix)
        if architecture == "sm90" and family(key) == "prefill":
            assert any("wgmma" in name for name in report.matrix), key


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_got_worse_than_the_stored_report(architecture: str) -> None:
    assert STORED["triton"] == triton.__version__, REMEDY
    for key, report in compiled(architecture).items():
        before = STORED["kernels"][key]
        assert report.registers <= before["registers"] + 8, (key, REMEDY)
        assert report.scalar_spills <= before["scalar_spills"], (key, REMEDY)
        assert report.lds <= before["lds"], (key, REMEDY)
        assert list(report.matrix) == list(before["matrix"]), (key, REMEDY)


def test_the_stored_report_holds_every_kernel_and_variant_and_the_page_is_of_it() -> None:
    keys = [variant.key for architecture in ARCHITECTURES for variant in variants(architecture)]
    assert list(STORED["kernels"]) == keys
    written = {
        name
        for path in (WORKER / "kernels", WORKER / "attention/triton")
        for file in path.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {variant.kernel.__name__ for variant in variants("sm90")} == written
    rows = {key: Report(**row) for key, row in STORED["kernels"].items()}
    assert (REFERENCE / "kernels.md").read_text() == as_markdown(rows), REMEDY
