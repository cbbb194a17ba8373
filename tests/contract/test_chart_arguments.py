"""What the chart renders is what the operator's command line and environment take."""

from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from tilefleet_operator.cli import tilefleet as cli

CHART = Path(__file__).parents[2] / "helm" / "tilefleet"


def container(values: dict[str, Any]) -> dict[str, Any]:
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="tilefleet", namespace="tilefleet-system")
    (text,) = (text for path, text in texts.items() if path.endswith("/deployment.yaml"))
    found: dict[str, Any] = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"][0]
    return found


def test_rendered_arguments_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "watchNamespaces": ["a", "b"],
        "hfEndpoint": "https://hub.example",
        "log": {"format": "text"},
        "workers": {
            "networkPolicy": {"adminFrom": ["monitoring", "10.0.0.0/8"]},
            "deviceGroups": [44, 109],
        },
        "image": {"worker": {"tag": "w"}, "workerCpu": {"tag": "c"}},
    }
    rendered = container(values)
    for variable in rendered["env"]:
        monkeypatch.setenv(variable["name"], variable["valueFrom"]["fieldRef"]["fieldPath"])
    parsed = cli.build_parser().parse_args(rendered["args"])
    ports = {port["name"]: port["containerPort"] for port in rendered["ports"]}
    assert (parsed.probe_port, parsed.metrics_port) == (ports["probes"], ports["metrics"])
    assert parsed.watch_namespaces == "a,b"
    assert parsed.hf_endpoint == "https://hub.example"
    assert parsed.worker_image == "tilefleet/worker:w"
    assert parsed.worker_cpu_image == "tilefleet/worker-cpu:c"
    assert parsed.lease_name == "tilefleet-operator"
    assert parsed.log_format == "text"
    assert parsed.worker_network_policy is True
    assert parsed.admin_from == ("monitoring", "10.0.0.0/8")
    assert parsed.device_groups == (44, 109)
    assert (parsed.namespace, parsed.identity) == ("metadata.namespace", "metadata.name")


def test_default_arguments_parse() -> None:
    parsed = cli.build_parser().parse_args(container({})["args"])
    assert parsed.watch_namespaces == ""
    assert parsed.hf_endpoint == ""
    assert (parsed.admin_from, parsed.device_groups) == (("monitoring",), ())
    assert parsed.balloon_priority_class == "tilefleet-system-tilefleet-balloon"


def test_network_policies_of_fleets_can_be_switched_off() -> None:
    off = {"workers": {"networkPolicy": {"enabled": False}}}
    assert cli.build_parser().parse_args(container(off)["args"]).worker_network_policy is False
