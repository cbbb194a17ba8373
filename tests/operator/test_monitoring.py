"""Alerts and dashboards: PromQL that parses, over series that exist, with a runbook for each."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.operator.test_helm_chart import CHART, ROOT, objects
from tests.worker.server.test_metrics_page import NEEDED
from tilefleet_operator.telemetry import Telemetry

RULES = CHART / "files" / "monitoring" / "rules.yaml"
# AMD's device metrics exporter, docs/configuration/metricslist.md of v1.5.2.
EXPORTER = {"gpu_health", "gpu_package_power"}
SUFFIXES = {
    "counter": ["_total"],
    "histogram": ["_bucket", "_count", "_sum"],
    "gauge": [""],
}  # fmt: skip


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text().replace("TTFT_SECONDS", "2"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[tuple[str, dict[str, Any]]]:
    boards = sorted((CHART / "files" / "dashboards").glob("*.json"))
    return [
        (board.name, panel)
        for board in boards
        for panel in json.loads(board.read_text())["panels"]
        if panel["type"] != "row"
    ]


def expressions() -> list[str]:
    shown = [target["expr"] for _, panel in panels() for target in panel["targets"]]
    plain = [re.sub(r"\$\w+", "x", text) for text in shown]
    return [rule["expr"] for rule in rules()] + plain


def names(node: Any) -> Iterator[str]:
    """Metric names in a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for part in ("expr", "lhs", "rhs", "vector_selector", "param"):
        child = getattr(node, part, None)
        if child is not None:
            yield from names(child)
    for child in getattr(node, "args", None) or ():
        yield from names(child)


def known() -> set[str]:
    """Every series of the operator, of the worker and of AMD's exporter that we know."""
    own = {family.name: family.type for family in Telemetry().registry.collect()}
    return EXPORTER | {
        name + suffix for name, kind in {**own, **NEEDED}.items() for suffix in SUFFIXES[kind]
    }


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_parses_and_reads_series_that_exist(expression: str) -> None:
    found = set(names(promql_parser.parse(expression)))
    assert found
    assert found <= known()


def test_every_alert_says_what_is_wrong_and_has_a_runbook() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbooks.md").read_text(), re.M)
    alerts = [rule for rule in rules() if "alert" in rule]
    assert sections == [alert["alert"] for alert in alerts if alert["alert"] in sections]
    assert sorted(sections) == sorted(alert["alert"] for alert in alerts)
    for alert in alerts:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} == set(alert["annotations"])


def test_every_panel_has_a_title_a_text_and_a_place() -> None:
    places = set()
    for board, panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        where = panel["gridPos"]
        assert where["x"] + where["w"] <= 24
        place = (board, where["x"], where["y"])
        assert place not in places
        places.add(place)


def test_the_chart_renders_both_when_asked() -> None:
    rule = {"enabled": True, "ttftSeconds": 0.5, "runbookUrl": "https://runbooks.example/tilefleet"}
    found = objects({"metrics": {"prometheusRule": rule, "dashboards": {"enabled": True}}})
    (made,) = [o for o in found if o["kind"] == "PrometheusRule"]
    rendered = [one for group in made["spec"]["groups"] for one in group["rules"]]
    assert [one.get("alert") for one in rendered] == [one.get("alert") for one in rules()]
    late = next(one for one in rendered if one.get("alert") == "TilefleetTimeToFirstTokenHigh")
    assert "> 0.5" in late["expr"]
    assert "{{ $labels.model_name }}" in late["annotations"]["summary"]
    anchor = "https://runbooks.example/tilefleet#tilefleettimetofirsttokenhigh"
    assert late["annotations"]["runbook_url"] == anchor
    (board,) = [o for o in found if o["metadata"]["name"].endswith("-dashboards")]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["fleets.json"])["title"] == "tilefleet"


def test_neither_is_rendered_unasked() -> None:
    found = objects()
    assert "PrometheusRule" not in {o["kind"] for o in found}
    assert not [o for o in found if o["metadata"]["name"].endswith("-dashboards")]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_rules_and_the_metrics(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(RULES.read_text().replace("TTFT_SECONDS", "2"))
    subprocess.run(["promtool", "check", "rules", str(file)], check=True, capture_output=True)
