"""Conditions in a status: no flapping, nothing lost, every reason on the one list."""

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operator import builders
from tests.operator.builders import DEFAULTS, NOW, amd, deployment, manual, snapshot
from tilefleet_operator.condition import HOLD_SECONDS, Condition, hold_wait, written
from tilefleet_operator.conditions import unknown
from tilefleet_operator.desired import revision
from tilefleet_operator.plan import plan
from tilefleet_operator.reasons import (
    CONDITIONS,
    EVENTS,
    QUESTIONS,
    TYPES,
    ConditionType,
    EventReason,
    Reason,
)

PACKAGE = Path(__file__).parents[2] / "operator" / "tilefleet_operator"
VALID = Condition("SpecValid", "True", "Valid", "")
FRESH = Condition("MetricsAvailable", "True", "Fresh", "all answer")
SILENT = Condition("MetricsAvailable", "False", "Unreachable", "one is silent")


def step(status: dict[str, Any], new: Condition, now: float, generation: int = 1) -> dict[str, Any]:
    """The status after one write of SpecValid and another condition."""
    conditions = written([VALID, new], generation, status, now)
    return {"observedGeneration": generation, "conditions": conditions}


def value(status: dict[str, Any]) -> str:
    return str(status["conditions"][1]["status"])


def settled() -> dict[str, Any]:
    """MetricsAvailable went False 100 s after the first status, so it may flap from then on."""
    return step(step({}, FRESH, NOW), SILENT, NOW + 100)


def test_a_value_stays_for_ten_seconds_with_its_reason_and_message() -> None:
    status = settled()
    early = step(status, FRESH, NOW + 109)
    assert early == status, "nothing to write"
    late = step(status, FRESH, NOW + 110)
    assert value(late) == "True"
    assert hold_wait([VALID, FRESH], 1, status, NOW + 107) == pytest.approx(3.0)
    assert hold_wait([VALID, SILENT], 1, status, NOW + 107) is None


def test_the_first_change_of_a_condition_comes_at_once() -> None:
    assert value(step(step({}, FRESH, NOW), SILENT, NOW + 1)) == "False"


def test_a_changed_spec_is_answered_at_once() -> None:
    assert value(step(settled(), FRESH, NOW + 101, generation=2)) == "True"


def test_a_clock_that_was_set_back_holds_nothing() -> None:
    assert value(step(settled(), FRESH, NOW - 3600)) == "True"


def test_reason_and_message_of_a_value_that_stays_follow_at_once() -> None:
    two = Condition("MetricsAvailable", "False", "Unreachable", "two are silent")
    status = step(settled(), two, NOW + 101)
    assert status["conditions"][1]["message"] == "two are silent"
    assert (
        status["conditions"][1]["lastTransitionTime"]
        == settled()["conditions"][1]["lastTransitionTime"]
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 15)), min_size=1, max_size=40))
def test_transitions_lie_apart_and_the_last_value_wins(walk: list[tuple[bool, int]]) -> None:
    """Whatever is observed: at most one change in 10 s after the first, and no change is lost."""
    status, now = step({}, FRESH, NOW), NOW
    changes: list[float] = []
    for good, pause in walk:
        now += pause
        wanted = FRESH if good else SILENT
        after = step(status, wanted, now)
        if value(after) != value(status):
            changes.append(now)
        elif value(after) != wanted.status:
            left = hold_wait([VALID, wanted], 1, status, now)
            assert left is not None
            assert 0 < left <= HOLD_SECONDS
        status = after
    # The first change may follow at once; from then on they lie apart.
    later = [b - a for a, b in pairwise(changes)]
    assert all(gap >= HOLD_SECONDS for gap in later if changes[0] > NOW)
    final = FRESH if walk[-1][0] else SILENT
    assert value(step(status, final, now + HOLD_SECONDS)) == final.status


def test_a_plan_looks_again_when_a_held_condition_may_change() -> None:
    """Else a fleet at rest would go on showing the old value."""
    of = manual(1)
    name = revision(of, DEFAULTS)
    pods = (builders.pod(f"llm-{name}-0", name, ready=False),)
    children = builders.children(of)
    first = plan(snapshot(of, pods, children=children), DEFAULTS, NOW).status
    assert first is not None
    ready = (builders.pod(f"llm-{name}-0", name),)
    second = plan(snapshot(manual(1), ready, children=children), DEFAULTS, NOW).status
    assert second is not None
    second["conditions"][0]["lastTransitionTime"] = "2027-01-15T08:16:40Z"  # NOW + 1000
    again = builders.deployment(second, replicas=1, autoscaling={"mode": "Manual"})
    made = plan(snapshot(again, pods, children=children), DEFAULTS, NOW + 1004)
    shown = {c["type"]: c["status"] for c in (made.status or second)["conditions"]}
    assert shown["Ready"] == "True"
    assert made.requeue_after == pytest.approx(6.0)


def test_every_type_and_reason_is_explained() -> None:
    assert tuple(CONDITIONS) == TYPES == tuple(QUESTIONS)
    listed = {reason for reasons in CONDITIONS.values() for reason in reasons}
    assert listed == set(get_args(Reason))
    assert set(EVENTS) == set(get_args(EventReason))
    texts = [one for reasons in CONDITIONS.values() for one in reasons.values()]
    assert all(one.meaning for one in texts + [text for _, text in EVENTS.values()])


def test_every_listed_reason_is_given_somewhere() -> None:
    """No page for what never happens; mypy proves the other way round."""
    said: set[object] = set()
    for path in PACKAGE.glob("*.py"):
        if path.name != "reasons.py":
            tree = ast.parse(path.read_text())
            said |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert {*get_args(Reason), *get_args(EventReason)} - said == set()


def pairs(status: Any) -> set[tuple[str, str]]:
    return {(one["type"], one["reason"]) for one in status["conditions"]}


@given(builders.pods(("old", "new")), st.sampled_from(["manual", "auto", "amd", "paused"]))
def test_every_type_is_always_there_with_a_reason_of_its_own_list(pods: Any, kind: str) -> None:
    of = {
        "manual": manual(3), "auto": deployment(), "amd": amd(2), "paused": manual(2, paused=True),
    }[kind]  # fmt: skip
    status = plan(snapshot(of, pods), DEFAULTS, NOW).status
    assert status is not None
    for one in status["conditions"]:
        assert one["observedGeneration"] == of.generation
        assert one["reason"] in CONDITIONS[one["type"]]
    assert [one["type"] for one in status["conditions"]] == list(TYPES)


def test_an_invalid_spec_has_every_type_too() -> None:
    found = unknown(["spec.x: unknown field"])
    assert {one.type for one in found} == set(get_args(ConditionType))
    assert all(one.reason in CONDITIONS[one.type] for one in found)
