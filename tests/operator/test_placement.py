"""Placement: what the plan says fits is what the scheduler places, over all kinds of AMD nodes."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator.amd_node_kinds import kinds
from tests.operator.builders import DEFAULTS, amd, manual, node
from tests.operator.scheduler_model import devices, feasible
from tilefleet_operator.accelerator import AcceleratorSpec
from tilefleet_operator.desired import pod as render
from tilefleet_operator.desired import revision
from tilefleet_operator.hardware import Nodes, is_candidate
from tilefleet_operator.judgement import judge
from tilefleet_operator.observed import NodeView, node_view
from tilefleet_operator.options import Placement
from tilefleet_operator.partitions import labels_stale, offers
from tilefleet_operator.placement import Fit, Waiting, assign, fit, unseen

Json = dict[str, Any]
CPX = {"compute": "CPX", "memory": "Any"}


def spec(**changes: Any) -> AcceleratorSpec:
    return AcceleratorSpec.model_validate({"vendor": "amd", "products": ["MI300X"], **changes})


KINDS = sorted(kinds("n"))


def one(kind: str) -> NodeView:
    return node_view(kinds("n1")[kind])


def verdict(kind: str, accelerator: AcceleratorSpec) -> str | tuple[str, int]:
    """The reason of refusal, or the resource and the replicas that fit."""
    found = fit(accelerator, [one(kind)], {})
    if found.refused:
        return found.refused[0][1]
    option = next(o for o in found.options if o.matching)
    return option.resource, found.replicas


@pytest.mark.parametrize(
    ("kind", "accelerator", "expected"),
    [
        ("spx8", spec(count=8), ("amd.com/gpu", 1)),
        ("spx8", spec(partition={"compute": "SPX"}), ("amd.com/gpu", 8)),
        ("spx8", spec(partition=CPX), "partition spx_nps1, not CPX"),
        ("spx8", spec(resourceName="amd.com/spx_nps1"),
         "offers amd.com/gpu, not amd.com/spx_nps1"),
        ("cpx64", spec(), ("amd.com/cpx_nps4", 64)),
        ("cpx64", spec(partition={"compute": "CPX", "memory": "NPS4"}), ("amd.com/cpx_nps4", 64)),
        ("cpx64", spec(partition={"compute": "CPX", "memory": "NPS1"}),
         "partition cpx_nps4, not CPX NPS1"),
        ("cpx64", spec(count=2), "partition cpx_nps4, not 2 whole GPUs"),
        ("vf1", spec(), ("amd.com/gpu", 1)),
        ("hetero", spec(partition={"compute": "SPX"}), ("amd.com/spx_nps1", 5)),
        ("hetero", spec(partition=CPX), ("amd.com/cpx_nps1", 24)),
        ("hetero", spec(), ("amd.com/spx_nps1", 29)),
        ("hetero", spec(count=4), ("amd.com/spx_nps1", 1)),
        ("hetero", spec(partition={"compute": "DPX"}), "partition spx_nps1, cpx_nps1, not DPX"),
        ("twoids", spec(), "mixes device ids 740f, 74a1"),
        ("twoids", spec(products=["MI300X", "MI210"]), ("amd.com/gpu", 8)),
        ("twoids", spec(products=[]), ("amd.com/gpu", 8)),
        ("sick", spec(), "taint amd-gpu-unhealthy=AMDGPUXgmi"),
        ("sick", spec(tolerations=[{"operator": "Exists"}]), "condition AMDGPUXgmi"),
        ("sick-untainted", spec(), "condition AMDGPUXgmi"),
        ("sick-gpu", spec(), ("amd.com/gpu", 7)),
        ("cpx-sick-gpu", spec(), "partitions of unhealthy GPU 3 cannot be told from others"),
        ("betaonly", spec(), ("amd.com/gpu", 8)),
        ("betaonly", spec(partition={"compute": "SPX"}), ("amd.com/gpu", 8)),
        ("cpx-single", spec(partition=CPX), ("amd.com/gpu", 64)),
        ("cpx-single", spec(count=8), "partition cpx_nps1, not 8 whole GPUs"),
        ("cpx-unlabelled", spec(partition=CPX), ("amd.com/gpu", 63)),
        ("cpx-unlabelled", spec(count=8), "partition cpx, not 8 whole GPUs"),
        ("cpx-failed", spec(), "partitioning failure"),
        ("cpx-busy", spec(), "partitioning applying"),
        ("cpx-tainted", spec(), "taint amd-dcm=up"),
        ("cpx-remnant", spec(), ("amd.com/spx_nps1", 63)),
        ("stale", spec(), ("amd.com/cpx_nps4", 64)),
        ("stale-single", spec(partition={"compute": "SPX"}), "partition cpx, not SPX"),
        ("provisioning", spec(), "offers no amd.com/gpu"),
        ("passthrough", spec(), "mode vf-passthrough"),
        ("cordoned", spec(), "cordoned"),
        ("not-ready", spec(), "not Ready"),
        ("dedicated", spec(), "taint team"),
        ("convention", spec(), ("amd.com/gpu", 8)),
        ("mi210", spec(), "device id 740f, not 74a1, 74a9, 74b5, 74bd"),
        ("mi210", spec(products=["MI210"], partition={"compute": "SPX"}), ("amd.com/gpu", 8)),
        ("leftover", spec(), "device id 740f, not 74a1, 74a9, 74b5, 74bd"),
        ("zero-count", spec(products=["MI210"]), ("amd.com/gpu", 8)),
        ("no-labels", spec(), "no device id label"),
        ("no-labels", spec(products=[]), ("amd.com/gpu", 8)),
        ("no-labels", spec(products=[], partition=CPX), "partition unknown, not CPX"),
    ],
)  # fmt: skip
def test_verdict_on_every_kind_of_node(
    kind: str, accelerator: AcceleratorSpec, expected: str | tuple[str, int]
) -> None:
    assert verdict(kind, accelerator) == expected


@pytest.mark.parametrize(
    ("kind", "partition", "gigabytes"),
    [("spx8", "spx_nps1", 192), ("cpx64", "cpx_nps4", 24), ("cpx-single", "cpx_nps1", 24),
     ("vf1", "spx", 192), ("betaonly", "spx", 192), ("mi210", "spx", 192)],
)  # fmt: skip
def test_partition_and_memory_of_a_device(kind: str, partition: str, gigabytes: float) -> None:
    (offer,) = offers(one(kind))
    assert offer.partition == partition
    assert offer.bytes_per_device == gigabytes * 1e9


def test_two_pools_of_a_mixed_node_have_their_own_memory() -> None:
    found = {offer.resource: offer.bytes_per_device for offer in offers(one("hetero"))}
    assert found == {"amd.com/spx_nps1": 192e9, "amd.com/cpx_nps1": 24e9}


def test_labels_that_contradict_allocatable_are_stale() -> None:
    assert labels_stale(one("stale")) == "label says spx_nps1, Allocatable cpx_nps4"
    assert labels_stale(one("cpx-remnant")) == "label says cpx_nps4, Allocatable spx_nps1"
    assert labels_stale(one("stale-single")) == "label says spx_nps1, the number of devices cpx"
    fresh = [k for k in KINDS if not labels_stale(one(k))]
    assert sorted(set(KINDS) - set(fresh)) == ["cpx-remnant", "stale", "stale-single"]


def test_shortage_is_explained_with_its_arithmetic() -> None:
    nodes = [node("spx8", name) for name in ("n2", "n1")]
    found = fit(spec(count=8), [*nodes, node("sick")], {"n2": {"amd.com/gpu": 3.0}})
    assert found.replicas == 1
    assert found.arithmetic(3) == (
        "3 replicas × 8 amd.com/gpu = 24 wanted; matching nodes n1 (8 free of 8), n2 (5 free of 8)"
        " = 13; short of 11; refused: sick (taint amd-gpu-unhealthy=AMDGPUXgmi)"
    )


def test_fragments_are_named_when_the_sum_would_do() -> None:
    used = {"n1": {"amd.com/gpu": 4.0}, "n2": {"amd.com/gpu": 4.0}}
    text = fit(spec(count=8), [node("spx8", "n1"), node("spx8", "n2")], used).arithmetic(1)
    assert text.endswith("= 8; only 0 replicas find 8 on one node")


def test_every_option_is_in_the_arithmetic() -> None:
    wanted = spec(count=8, fallbacks=[{"products": ["MI210"], "count": 4}])
    nodes = [node_view(kinds("a")["spx8"]), node_view(kinds("b")["mi210"])]
    found = fit(wanted, nodes, {})
    assert found.arithmetic(4) == (
        "3 of 4 replicas fit. MI300X × 8 amd.com/gpu: 4 replicas × 8 amd.com/gpu = 32 wanted;"
        " matching nodes a (8 free of 8) = 8; short of 24. MI210 × 4 amd.com/gpu: 4 replicas × 4"
        " amd.com/gpu = 16 wanted; matching nodes b (8 free of 8) = 8; short of 8"
    )


def test_fallbacks_are_taken_in_order_and_only_without_room_before() -> None:
    wanted = spec(count=8, fallbacks=[{"products": ["MI325X"]}, {"products": [], "count": 2}])
    nodes = [node("spx8", "a"), node_view(kinds("b")["mi210"])]
    _, placements = assign(fit(wanted, nodes, {}), (), 6, "Pack")
    assert [(p.option.number, p.host) for p in placements] == [
        (0, "a"), (2, "b"), (2, "b"), (2, "b"), (2, "b"), (0, ""),
    ]  # fmt: skip


def test_waiting_pod_is_made_anew_for_the_option_with_room() -> None:
    wanted = spec(count=8, fallbacks=[{"products": ["MI210"]}])
    before = fit(wanted, [], {}).options[0]
    waiting = [Waiting("u1", before.key, before.title), Waiting("u2", before.key, before.title)]
    moved, _ = assign(fit(wanted, [one("mi210")], {}), waiting, 0, "Pack")
    assert [(m.uid, m.why, m.placement.option.number) for m in moved] == [
        ("u1", "MI300X × 8 amd.com/gpu finds no node; MI210 × 8 amd.com/gpu has room on n1", 1)
    ]
    moved, _ = assign(fit(wanted, [one("spx8")], {}), waiting, 0, "Pack")
    assert moved == [], "the scheduler will find the node"


def test_waiting_pod_learns_the_resource_name_of_the_first_node() -> None:
    before = fit(spec(), [], {}).options[0]
    assert before.resource == "amd.com/gpu"
    waiting = [Waiting("u", before.key, before.title)]
    (moved,), _ = assign(fit(spec(), [one("cpx64")], {}), waiting, 1, "Pack")
    assert moved.why == (
        "MI300X × 1 amd.com/gpu finds no node; MI300X × 1 amd.com/cpx_nps4 has room on n1"
    )


def test_choices_are_tried_in_turn_where_nobody_brings_a_node() -> None:
    wanted = spec(count=8, fallbacks=[{"products": ["MI325X"]}, {"products": ["MI355X"]}])
    found = fit(wanted, [], {})
    tried = []
    option = found.options[0]
    for _ in range(4):
        patient = [Waiting("u", option.key, option.title)]
        assert assign(found, patient, 0, "Pack") == ([], [])
        (move,), _ = assign(found, [replace(patient[0], given_up=True)], 0, "Pack")
        option = move.placement.option
        tried.append(option.title)
    assert tried == [f"{m} × 8 amd.com/gpu" for m in ("MI325X", "MI355X", "MI300X", "MI325X")]
    alone = fit(spec(count=8), [], {})
    stuck = Waiting("u", alone.options[0].key, "", given_up=True)
    assert assign(alone, [stuck], 0, "Pack") == ([], [])


def test_resource_of_absent_nodes_follows_the_strategy_of_those_that_are_there() -> None:
    wanted = spec(partition={"compute": "CPX", "memory": "NPS4"})
    assert unseen(wanted).option.resource == "amd.com/gpu"
    assert fit(wanted, [one("hetero")], {}).options[0].resource == "amd.com/cpx_nps4"
    assert unseen(spec(resourceName="amd.com/cpx_nps4")).option.resource == "amd.com/cpx_nps4"


def test_replicas_fill_a_node_before_the_next() -> None:
    nodes = [node("spx8", name) for name in ("a", "b", "c")]
    found = fit(spec(count=2), nodes, {"b": {"amd.com/gpu": 4}})
    _, packed = assign(found, (), 4, "Pack")
    assert [p.host for p in packed] == ["b", "b", "a", "a"]
    _, spread = assign(found, (), 4, "Spread")
    assert {p.host for p in spread} == {""}


def test_revision_knows_no_node() -> None:
    of = amd(1)
    here = fit(of.spec.accelerator, [one("cpx64"), one("spx8")], {}).options[0]
    body = render(of, 0, "r", DEFAULTS, placement=Placement(here, "n1"))
    assert body["spec"] != render(of, 0, "r", DEFAULTS)["spec"]
    other = manual(1, accelerator={**of.spec.accelerator.model_dump(), "products": ["MI325X"]})
    assert revision(of, DEFAULTS) != revision(other, DEFAULTS)


PARTITIONS = [
    {"compute": "Any", "memory": "Any"},
    {"compute": "SPX", "memory": "Any"},
    {"compute": "CPX", "memory": "Any"},
    {"compute": "CPX", "memory": "NPS4"},
    {"compute": "Any", "memory": "NPS1"},
]


@st.composite
def choices(draw: st.DrawFn) -> Json:
    """Products, count and partition of one choice that the API accepts."""
    partition = draw(st.sampled_from(PARTITIONS))
    whole = partition["compute"] in ("Any", "SPX")
    return {
        "products": draw(st.sampled_from([[], ["MI300X"], ["MI210"], ["MI300X", "MI210"]])),
        "count": draw(st.sampled_from([1, 2, 4, 8] if whole else [1])),
        "partition": partition,
    }


@st.composite
def accelerators(draw: st.DrawFn) -> AcceleratorSpec:
    """Any accelerator: choice, fallbacks, a resource name, a toleration."""
    extra: Json = {"fallbacks": draw(st.lists(choices(), max_size=2))}
    if draw(st.integers(0, 5)) == 0:
        extra["tolerations"] = [{"operator": "Exists"}]
    own = draw(choices())
    if draw(st.integers(0, 5)) == 0 and own["partition"]["compute"] == "Any":
        extra["resourceName"] = draw(st.sampled_from(["amd.com/gpu", "amd.com/cpx_nps4"]))
    return AcceleratorSpec.model_validate({"vendor": "amd", **own, **extra})


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Json], dict[str, dict[str, int]]]:
    """Nodes of any kinds, and devices that others hold on them."""
    drawn = draw(st.lists(st.sampled_from(KINDS), max_size=5))
    nodes = [kinds(f"n{i}")[kind] for i, kind in enumerate(drawn)]
    used: dict[str, dict[str, int]] = {}
    for body in nodes:
        for name, count in body["status"]["allocatable"].items():
            if name.startswith("amd.com/") and int(count):
                taken = draw(st.sampled_from([0, 0, 1, int(count) - 1]))
                used.setdefault(body["metadata"]["name"], {})[name] = taken
    return nodes, used


@settings(max_examples=400, deadline=None)
@given(accelerators(), clusters(), st.integers(1, 12), st.data())
def test_what_the_plan_says_fits_is_what_the_scheduler_places(
    accelerator: AcceleratorSpec,
    cluster: tuple[list[Json], dict[str, dict[str, int]]],
    replicas: int,
    data: st.DataObject,
) -> None:
    """The scheduler takes any feasible node, and the number that it places is the plan's."""
    nodes, used = cluster
    of = manual(replicas, accelerator=accelerator.model_dump(by_alias=True))
    found = fit(accelerator, map(node_view, nodes), used)
    _, placements = assign(found, (), replicas, accelerator.packing)
    held = {name: dict(use) for name, use in used.items()}
    placed = 0
    for slot, placement in enumerate(placements):
        body = json.loads(json.dumps(render(of, slot, "r", DEFAULTS, placement=placement)))
        names = feasible(body, nodes, held)
        allowed = {n.name for n in placement.option.matching if placement.option.count <= n.total}
        assert set(names) <= allowed, "the scheduler may choose what the plan did not"
        if names:
            placed += 1
            name = data.draw(st.sampled_from(sorted(names)))
            here = held.setdefault(name, {})
            for resource, count in devices(body).items():
                here[resource] = here.get(resource, 0) + count
    assert placed == min(replicas, found.replicas)
    candidates = {b["metadata"]["name"] for b in nodes if is_candidate(node_view(b))}
    named = {name for name, _ in found.refused} | {n.name for n in found.matching}
    assert named == candidates, "every AMD node matches or is refused"
    assert all(why for _, why in found.refused)


@settings(max_examples=100, deadline=None)
@given(accelerators(), clusters(), st.integers(0, 6), st.randoms(use_true_random=False))
def test_same_result_for_any_order_of_the_nodes(
    accelerator: AcceleratorSpec,
    cluster: tuple[list[Json], dict[str, dict[str, int]]],
    replicas: int,
    random: Any,
) -> None:
    nodes, used = cluster
    views = [node_view(body) for body in nodes]
    before: Fit = fit(accelerator, views, used)
    random.shuffle(views)
    after = fit(accelerator, views, dict(sorted(used.items(), reverse=True)))
    assert before == after
    assert assign(before, (), replicas, "Pack") == assign(after, (), replicas, "Pack")


def test_what_is_known_of_the_same_nodes_is_found_out_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand fleets ask the same of the same nodes; the answer is the one without memory."""
    asked: list[str] = []

    def counting(one: NodeView, *rest: Any) -> Any:
        asked.append(one.name)
        return judge(one, *rest)

    monkeypatch.setattr("tilefleet_operator.placement.judge", counting)
    plain = [node("spx8", "n1"), node("cpx64", "n2"), node("sick", "n3")]
    kept, used = Nodes(plain), {"n1": {"amd.com/gpu": 3.0}}
    for wanted in (spec(count=8), spec(count=1), spec(count=8)):
        assert fit(wanted, kept, used) == fit(wanted, plain, used)
        assert fit(wanted, kept, {}) == fit(wanted, plain, {})
    without = 3 * 2 * len(plain)
    assert len(asked) == without + 2 * len(plain), "once for each of the two specs"
