"""A sample of the fault sweep; `make test-faults` runs all of it."""

import pytest

from tests.faults.results import Point, whole
from tests.faults.sweep import ALONE, SHARED, run

pytestmark = pytest.mark.apiserver
# The watch that says nothing any more is found after 70 s: too long for a sample.
SAMPLE = tuple(fault for fault in (*SHARED, *ALONE) if fault != "watch half-open")


async def test_a_fleet_ends_as_undisturbed_whatever_happens() -> None:
    """Each fault at one write of the roll."""
    figures = await run(SAMPLE, points=(Point("roll", 4),))
    assert whole(figures), figures
    assert figures["reached"] == figures["cases"] == len(SAMPLE)
