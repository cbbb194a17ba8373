"""Devices in use, counted pod by pod, against the count over all pods."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.operator.builders import pod
from tilefleet_operator.observed import PodView, device_use
from tilefleet_operator.tally import DeviceTally

RESOURCES = ("amd.com/gpu", "amd.com/cpx_nps4", "cpu")


@st.composite
def views(draw: st.DrawFn) -> PodView:
    labels = {"tilefleet.io/role": draw(st.sampled_from(("worker", "balloon")))}
    return replace(
        pod("p", "r"),
        labels=labels,
        node=draw(st.sampled_from((None, "n1", "n2"))),
        phase=draw(st.sampled_from(("Pending", "Running", "Failed", "Succeeded"))),
        requests=draw(st.dictionaries(st.sampled_from(RESOURCES), st.integers(0, 8).map(float))),
    )


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | views()), max_size=40))
def test_the_tally_equals_a_count_over_all_pods(steps: list[tuple[str, PodView | None]]) -> None:
    tally, pods = DeviceTally(), dict[str, PodView]()
    for uid, view in steps:
        before, copy = tally.use, {node: dict(used) for node, used in tally.use.items()}
        tally.put(uid, view)
        pods.pop(uid, None)
        if view is not None:
            pods[uid] = view
        counted = device_use(tuple(pods.values()))
        nonzero = {
            node: left
            for node, used in counted.items()
            if (left := {name: amount for name, amount in used.items() if amount})
        }
        assert tally.use == nonzero
        assert before == copy, "a plan that holds the former count keeps it"
