"""Node fit: the labeller's forms, health, partitions, and the arithmetic of a shortage."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tilefleet_operator.api import AcceleratorSpec
from tilefleet_operator.hardware import (
    NodeView,
    Taint,
    device_ids,
    fit,
    is_candidate,
    is_sick,
    node_selector_terms,
    wanted_ids,
    why_not,
)
from tilefleet_operator.observed import node_view

FIXTURES: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "amd_nodes.json").read_text()
)
MI300X = AcceleratorSpec(vendor="amd", products=["MI300X"], count=8)
ANY = AcceleratorSpec(vendor="amd", count=8)


def node(name: str) -> NodeView:
    return node_view(FIXTURES[name])


@pytest.mark.parametrize(
    ("name", "ids", "reason"),
    [
        ("spx8", ("74a1",), ""),
        ("vf1", ("74b5",), ""),
        ("betaonly", ("74a1",), ""),
        ("cpx64", ("74a1",), "offers amd.com/cpx_nps4, not amd.com/gpu"),
        ("hetero", ("74a1",), "offers amd.com/cpx_nps1, amd.com/spx_nps1, not amd.com/gpu"),
        ("twoids", ("740f", "74a1"), "mixes device ids 740f, 74a1"),
        ("sick", ("74a1",), "taint amd-gpu-unhealthy=AMDGPUXgmi"),
    ],
)
def test_node_fixtures(name: str, ids: tuple[str, ...], reason: str) -> None:
    assert is_candidate(node(name))
    assert device_ids(node(name)) == ids
    assert why_not(node(name), MI300X) == reason


def test_mixed_node_is_fine_when_every_model_on_it_is_wanted() -> None:
    both = AcceleratorSpec(vendor="amd", products=["MI300X", "MI210"], count=1)
    assert why_not(node("twoids"), both) == ""
    assert why_not(node("twoids"), ANY) == ""


def test_old_count_of_zero_is_ignored() -> None:
    view = NodeView(
        "n",
        labels={"amd.com/gpu.device-id.74a1": "0", "amd.com/gpu.device-id.0x740F": "4"},
        allocatable={"amd.com/gpu": 4},
    )
    assert device_ids(view) == ("740f",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ready": False}, "not Ready"),
        ({"schedulable": False}, "cordoned"),
        ({"taints": (Taint("amd-dcm", "up", "NoExecute"),)}, "taint amd-dcm=up"),
        ({"taints": (Taint("dedicated", "", "NoSchedule"),)}, "taint dedicated"),
        ({"taints": (Taint("amd.com/gpu", "true", "NoSchedule"),)}, ""),
        ({"taints": (Taint("slow", "", "PreferNoSchedule"),)}, ""),
        ({"conditions": {"AMDGPUXgmi": "True"}}, "condition AMDGPUXgmi"),
        ({"conditions": {"AMDGPUXgmi": "False"}}, ""),
        ({"allocatable": {"amd.com/gpu": 0.0}}, "offers no amd.com/gpu"),
    ],
)
def test_reasons_of_refusal(change: dict[str, Any], reason: str) -> None:
    assert why_not(replace(node("spx8"), **change), MI300X) == reason


def test_reasons_in_labels() -> None:
    def labelled(**labels: str) -> NodeView:
        view = node("spx8")
        return replace(view, labels={**view.labels, **labels})

    partitioning = labelled(**{"dcm.amd.com/gpu-config-profile-state": "failure"})
    assert why_not(partitioning, ANY) == "partitioning failure"
    passthrough = labelled(**{"amd.com/gpu.mode": "vf-passthrough"})
    assert why_not(passthrough, ANY) == "mode vf-passthrough"
    wanted = AcceleratorSpec(vendor="amd", node_selector={"zone": "a"})
    assert why_not(labelled(zone="b"), wanted) == "label zone is b, not a"
    mi210 = AcceleratorSpec(vendor="amd", products=["MI210"])
    assert why_not(node("spx8"), mi210) == "device id 74a1, not 740f, 7410"
    unlabelled = NodeView("n", allocatable={"amd.com/gpu": 8})
    assert why_not(unlabelled, MI300X) == "no device id label"
    assert why_not(unlabelled, ANY) == ""


def test_extra_toleration_opens_a_tainted_node() -> None:
    tainted = replace(node("spx8"), taints=(Taint("team", "blue", "NoSchedule"),))
    for toleration, reason in [
        ({"key": "team", "operator": "Equal", "value": "blue"}, ""),
        ({"key": "team", "operator": "Equal", "value": "red"}, "taint team=blue"),
        ({"key": "team", "operator": "Exists", "effect": "NoExecute"}, "taint team=blue"),
        ({"operator": "Exists"}, ""),
    ]:
        spec = AcceleratorSpec.model_validate({"vendor": "amd", "tolerations": [toleration]})
        assert why_not(tainted, spec) == reason


def test_sick_node_is_recognised_with_and_without_its_taint() -> None:
    assert is_sick(node("sick"))
    assert is_sick(replace(node("sick"), taints=()))
    assert not is_sick(replace(node("sick"), taints=(), conditions={"Ready": "True"}))


def test_shortage_is_explained_with_its_arithmetic() -> None:
    nodes = [replace(node("spx8"), name=name) for name in ("n2", "n1")]
    found = fit(MI300X, [*nodes, node("sick")], {"n2": {"amd.com/gpu": 3.0}})
    assert found.replicas == 1
    assert found.arithmetic(3) == (
        "3 replicas × 8 amd.com/gpu = 24 wanted; matching nodes n1 (8 free of 8), n2 (5 free of 8)"
        " = 13; short of 11; refused: sick (taint amd-gpu-unhealthy=AMDGPUXgmi)"
    )


def test_fragments_are_named_when_the_sum_would_do() -> None:
    nodes = [replace(node("spx8"), name=name) for name in ("n1", "n2")]
    used = {"n1": {"amd.com/gpu": 4.0}, "n2": {"amd.com/gpu": 4.0}}
    text = fit(MI300X, nodes, used).arithmetic(1)
    assert text.endswith("= 8; only 0 replicas find 8 on one node")


def test_no_node_at_all() -> None:
    found = fit(MI300X, [NodeView("web", allocatable={"cpu": 8})], {})
    assert (found.matching, found.refused) == ((), ())
    assert "no node matches" in found.arithmetic(1)


def test_device_ids_override_products() -> None:
    both = AcceleratorSpec(vendor="amd", products=["MI210"], device_ids=["74a1"])
    assert wanted_ids(both) == ("74a1",)


def matches(terms: list[dict[str, Any]], labels: dict[str, str]) -> bool:
    """The scheduler's meaning of ORed terms of ANDed expressions."""

    def holds(e: dict[str, Any]) -> bool:
        if e["operator"] == "In":
            return labels.get(e["key"]) in e["values"]
        return (e["key"] in labels) == (e["operator"] == "Exists")

    return not terms or any(all(map(holds, t["matchExpressions"])) for t in terms)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("spx8", True), ("vf1", True), ("betaonly", True), ("twoids", False)],
)
def test_affinity_selects_what_fit_accepts(name: str, expected: bool) -> None:
    assert matches(node_selector_terms(MI300X), dict(node(name).labels)) is expected
    mi210 = AcceleratorSpec(vendor="amd", products=["MI210"])
    assert not matches(node_selector_terms(mi210), dict(node(name).labels))


def test_any_product_has_no_affinity() -> None:
    assert node_selector_terms(ANY) == []
