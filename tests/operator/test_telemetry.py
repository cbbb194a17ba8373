"""The operator's metrics: names, bounds, what a fleet shows; and its two probes over HTTP."""

import asyncio
import re
import socket
from typing import Any

import aiohttp
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.operator.builders import DEFAULTS, NOW, Clock, deployment, manual, snapshot
from tests.operator.test_leader import Harness
from tilefleet_operator import autoscale, telemetry
from tilefleet_operator.plan import plan
from tilefleet_operator.ports import serve_metrics, serve_probes
from tilefleet_operator.status import Telemetry as Measured
from tilefleet_operator.telemetry import Telemetry

REPORT = {
    "desiredReplicas": 3,
    "readyReplicas": 2,
    "conditions": [{"type": "Ready", "status": "True"}, {"type": "Degraded", "status": "Unknown"}],
}
LABELS = {"namespace": "team", "name": "llm"}


def value(of: Telemetry, series: str, /, **labels: str) -> float | None:
    return of.registry.get_sample_value(series, labels)


def test_names_follow_the_rules_of_promtool() -> None:
    """Prefix of ours, base units, counters end in _total, no colon, help for each."""
    found = Telemetry()
    found.observe_fleet("team", "llm", REPORT, Measured(0.5, 100.0, "Observed", 40.0, 5.0))
    for family in text_string_to_metric_families(generate_latest(found.registry).decode()):
        assert re.fullmatch(r"tilefleet_(operator|inferencedeployment)_[a-z_]+", family.name)
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"milli|_ms$|percent|minutes", family.name)
        assert family.type != "counter" or not family.name.endswith("_total")


def test_a_fleet_shows_its_sizes_figures_and_conditions() -> None:
    found = Telemetry()
    found.observe_fleet("team", "llm", REPORT, Measured(0.5, 100.0, "Observed", 40.0, 5.0))
    prefix = "tilefleet_inferencedeployment_"
    shown = {
        name: value(found, prefix + name, **LABELS)
        for name in ("desired_replicas", "ready_replicas", "utilization_ratio",
                     "replica_capacity_tokens_per_second", "demand_tokens_per_second",
                     "queue_tokens")
    }  # fmt: skip
    assert list(shown.values()) == [3, 2, 0.5, 100, 40, 5]
    assert value(found, prefix + "condition", **LABELS, type="Ready") == 1
    assert value(found, prefix + "condition", **LABELS, type="Degraded") == 0


def test_absence_is_not_zero_and_what_is_gone_has_no_series() -> None:
    found = Telemetry()
    found.observe_fleet("team", "llm", REPORT, Measured(0.5, 100.0, "Observed", 40.0, 5.0))
    found.observe_fleet("team", "llm", REPORT, Measured())
    assert value(found, "tilefleet_inferencedeployment_demand_tokens_per_second", **LABELS) is None
    found.forget_fleet("team", "llm")
    assert b'name="llm"' not in generate_latest(found.registry)


def test_fleets_beyond_the_bound_are_counted_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "FLEETS_SHOWN", 2)
    found = Telemetry()
    for name in ("a", "b", "c", "d", "c"):
        found.observe_fleet("team", name, REPORT, Measured())
    assert value(found, "tilefleet_operator_fleets_not_shown") == 2
    assert b'name="c"' not in generate_latest(found.registry)
    for name in ("a", "c"):
        found.forget_fleet("team", name)
    assert value(found, "tilefleet_operator_fleets_not_shown") == 1
    found.observe_fleet("team", "d", REPORT, Measured())
    assert b'name="d"' in generate_latest(found.registry)
    assert value(found, "tilefleet_operator_fleets_not_shown") == 0


def test_every_plan_carries_a_decision_of_the_closed_list() -> None:
    for of, code in (
        (manual(2), "Manual"),
        (deployment(), "NoReplicaReady"),
        (deployment(paused=True), "Paused"),
    ):
        made = plan(snapshot(of), DEFAULTS, NOW)
        assert made.decision == code
        assert code in autoscale.CODES


@pytest.fixture
def port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number: int = one.getsockname()[1]
    return number


async def get(port: int, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        return response.status, await response.text()


async def test_metrics_page_is_refreshed_at_each_scrape(port: int) -> None:
    found = Telemetry()
    runner = await serve_metrics(found, lambda: found.queue_depth.inc(), port)
    await get(port, "/metrics")
    status, text = await get(port, "/metrics")
    await runner.cleanup()
    assert (status, "tilefleet_operator_queue_depth 2.0" in text) == (200, True)


async def test_probes_answer_with_the_reasons(port: int) -> None:
    problems: list[str] = []
    runner = await serve_probes(lambda: problems, list, port)
    assert await get(port, "/healthz") == (200, "ok\n")
    problems.append("a key waits")
    assert await get(port, "/healthz") == (503, "a key waits\n")
    assert await get(port, "/readyz") == (200, "ok\n")
    await runner.cleanup()


@pytest.fixture
async def leader() -> Any:
    """A leader whose queue and view have clocks of the test's."""
    harness = Harness()
    clock = Clock()
    harness.leader.queue.clock = harness.leader.cache.clock = clock
    yield harness.leader, clock
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


async def test_a_stuck_queue_is_a_problem(leader: Any) -> None:
    found, clock = leader
    found.queue.add(("team", "llm"))
    clock.now = 119
    assert found.problems() == []
    clock.now = 121
    assert found.problems() == ["a key waits for 121 s, limit 120 s"]
    found.refresh()
    assert value(found.telemetry, "tilefleet_operator_queue_oldest_seconds") == 121


async def test_a_view_that_nothing_renews_is_a_problem(leader: Any) -> None:
    found, clock = leader
    found.cache.replace("pods", (), "1")
    clock.now = 599
    assert found.problems() == []
    clock.now = 601
    assert found.problems() == ["nothing was seen of pods for 601 s, limit 600 s"]


async def test_a_leader_is_synced_after_its_first_full_list(leader: Any) -> None:
    found, _ = leader
    assert not found.synced
    task = asyncio.create_task(found.run(lambda: None))
    async with asyncio.timeout(10):
        while not found.synced:
            await asyncio.sleep(0.01)
    task.cancel()
