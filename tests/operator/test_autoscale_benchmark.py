"""The simulated engine of benchmarks/autoscale.py keeps to its own model, so its figures mean
something: Little's law, conservation of requests, and the objectives at both extremes."""

import importlib.util
import sys
from collections import deque
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "autoscale.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("autoscale_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_replica_in_steady_state_follows_little_s_law(bench: ModuleType) -> None:
    """4 requests/s of (1000, 300): S = 0.1058, u = 0.423, so tau = a / (1 - u) = 20.8 ms."""
    replica = bench.Replica(0.0)
    now, end = 0.0, 600.0
    while now < end:
        now += 0.25
        replica.arrive(bench.Request(now, 1000, 300, 1000))
        replica.run(now)
    assert replica.busy / replica.step == pytest.approx(0.012 / (1 - 4 * 0.10580), rel=0.05)
    assert replica.load == pytest.approx(4 * 300 * 0.0208, rel=0.1)


def test_every_request_is_answered_once_and_memory_comes_back(bench: ModuleType) -> None:
    arrivals = bench.requests(lambda _: (5, 1000, 300), seed=3)[:500]
    replica, queue = bench.Replica(0.0), deque(arrivals)
    for tick in range(2000):
        while queue and queue[0].arrived < tick:
            replica.arrive(queue.popleft())
        replica.run(float(tick))
    assert replica.counts["completions"] == replica.counts["arrivals"] == 500
    assert (replica.reserved, replica.context, replica.load) == (0, 0, 0)
    assert replica.counts["generated"] == sum(one.output for one in arrivals)
    assert all(one.arrived < one.first <= one.last for one in arrivals)


@pytest.mark.parametrize(("size", "rate", "low", "high"), [(6, 2, 0.0, 0.0), (1, 40, 0.9, 1.0)])
def test_plenty_meets_the_objectives_and_far_too_little_does_not(
    bench: ModuleType, size: int, rate: float, low: float, high: float
) -> None:
    arrivals = bench.requests(lambda _: (rate, 1000, 300), seed=1)[: int(rate * 400)]
    missed, paid = bench.simulate(lambda _: size, 60.0, arrivals, 0.0)
    assert low <= missed <= high
    assert paid == pytest.approx(size * bench.SECONDS / 3600, rel=0.01)
