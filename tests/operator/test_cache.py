"""The cache: versions only rise, the dead stay dead, own writes are waited for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operator.builders import Clock
from tilefleet_operator.cache import EXPECTATION_SECONDS, ObjectCache

KEY = ("ns", "fleet")


def pod(name: str, uid: str, version: int, owner: str = "fleet") -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {"tilefleet.io/deployment": owner},
            "managedFields": [{"manager": "x"}],
        }
    }


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> ObjectCache:
    return ObjectCache(clock=clock)


def names(cache: ObjectCache) -> list[tuple[str, str]]:
    return [(b["metadata"]["name"], b["metadata"]["uid"]) for b in cache.children("pods", KEY)]


def test_the_newest_version_is_kept_without_managed_fields(cache: ObjectCache) -> None:
    assert cache.observe("pods", "ADDED", pod("a", "1", 10))
    assert cache.observe("pods", "MODIFIED", pod("a", "1", 12))
    assert not cache.observe("pods", "MODIFIED", pod("a", "1", 11))
    held = cache.get("pods", "ns", "a")
    assert held is not None
    assert held["metadata"]["resourceVersion"] == "12"
    assert "managedFields" not in held["metadata"]


def test_a_late_event_does_not_raise_the_dead(cache: ObjectCache) -> None:
    cache.observe("pods", "ADDED", pod("a", "1", 10))
    assert cache.observe("pods", "DELETED", pod("a", "1", 11))
    assert not cache.observe("pods", "MODIFIED", pod("a", "1", 10))
    assert names(cache) == []


def test_an_object_that_left_our_selector_can_come_back(cache: ObjectCache) -> None:
    """A watch with a selector shows the loss of the label as DELETED."""
    cache.observe("pods", "ADDED", pod("a", "1", 10))
    cache.observe("pods", "DELETED", pod("a", "1", 11))
    assert cache.observe("pods", "ADDED", pod("a", "1", 12))
    assert names(cache) == [("a", "1")]


def test_a_labelled_list_says_nothing_about_foreign_objects(cache: ObjectCache) -> None:
    foreign = pod("a", "1", 10)
    del foreign["metadata"]["labels"]
    cache.observe("services", None, foreign)
    cache.replace("services", [], "20", labelled=True)
    assert cache.get("services", "ns", "a") is not None
    cache.bury("services", "1")
    assert cache.get("services", "ns", "a") is None


def test_a_new_holder_of_a_name_survives_the_late_end_of_the_old(cache: ObjectCache) -> None:
    """Events of two UIDs may come in either order."""
    cache.observe("pods", "ADDED", pod("a", "old", 10))
    cache.observe("pods", "ADDED", pod("a", "new", 20))
    assert names(cache) == [("a", "new")]
    cache.observe("pods", "DELETED", pod("a", "old", 15))
    assert names(cache) == [("a", "new")]
    assert cache.get("pods", "ns", "a") is not None


def test_an_event_about_the_former_holder_is_ignored(cache: ObjectCache) -> None:
    cache.observe("pods", "ADDED", pod("a", "new", 20))
    assert not cache.observe("pods", "MODIFIED", pod("a", "old", 15))
    assert names(cache) == [("a", "new")]


def test_a_list_buries_ghosts_but_not_what_is_newer(cache: ObjectCache) -> None:
    cache.observe("pods", "ADDED", pod("ghost", "1", 10))
    cache.observe("pods", "ADDED", pod("kept", "2", 11))
    cache.observe("pods", "ADDED", pod("newer", "3", 30))
    assert cache.replace("pods", [pod("kept", "2", 11), pod("found", "4", 12)], "20")
    assert names(cache) == [("found", "4"), ("kept", "2"), ("newer", "3")]


def test_a_list_of_one_key_touches_no_other(cache: ObjectCache) -> None:
    cache.observe("pods", "ADDED", pod("a", "1", 10))
    cache.observe("pods", "ADDED", pod("b", "2", 10, owner="other"))
    cache.replace("pods", [], "20", key=KEY)
    assert names(cache) == []
    assert len(cache.children("pods", ("ns", "other"))) == 1


def test_a_child_follows_its_label(cache: ObjectCache) -> None:
    cache.observe("pods", "ADDED", pod("a", "1", 10))
    cache.observe("pods", "MODIFIED", pod("a", "1", 11, owner="other"))
    assert names(cache) == []
    assert len(cache.children("pods", ("ns", "other"))) == 1
    cache.observe("pods", "DELETED", pod("a", "1", 12, owner="other"))
    assert cache.deployment_keys() == set()


def test_changes_count_only_changes(cache: ObjectCache) -> None:
    cache.observe("pods", "ADDED", pod("a", "1", 10))
    before = cache.changes("pods")
    cache.observe("pods", "ADDED", pod("a", "1", 10))
    cache.replace("pods", [pod("a", "1", 10)], "20")
    assert cache.changes("pods") == before
    cache.observe("pods", "DELETED", pod("a", "1", 11))
    assert cache.changes("pods") == before + 1


def test_no_plan_until_a_created_pod_is_seen(cache: ObjectCache) -> None:
    cache.expect(KEY, "pods", "1", "10")
    assert cache.unmet(KEY) == EXPECTATION_SECONDS
    cache.observe("pods", "ADDED", pod("a", "1", 9))
    assert cache.unmet(KEY) is not None
    cache.observe("pods", "MODIFIED", pod("a", "1", 10))
    assert cache.unmet(KEY) is None


def test_a_delete_at_once_is_met_by_the_end_only(cache: ObjectCache) -> None:
    cache.observe("pods", "ADDED", pod("a", "1", 10))
    cache.expect(KEY, "pods", "1", None)
    cache.observe("pods", "MODIFIED", pod("a", "1", 99))
    assert cache.unmet(KEY) is not None
    cache.observe("pods", "DELETED", pod("a", "1", 100))
    assert cache.unmet(KEY) is None


def test_an_object_that_came_and_went_meets_every_expectation(cache: ObjectCache) -> None:
    cache.expect(KEY, "pods", "1", "50")
    cache.observe("pods", "DELETED", pod("a", "1", 60))
    assert cache.unmet(KEY) is None
    cache.expect(KEY, "pods", "1", "70")
    assert cache.unmet(KEY) is None


def test_a_write_that_changed_nothing_needs_no_wait(cache: ObjectCache) -> None:
    cache.observe("pods", "ADDED", pod("a", "1", 10))
    cache.expect(KEY, "pods", "1", "10")
    assert cache.unmet(KEY) is None


def test_the_deadline_passes_and_a_list_settles(cache: ObjectCache, clock: Clock) -> None:
    cache.expect(KEY, "pods", "1", "10")
    clock.now = EXPECTATION_SECONDS
    left = cache.unmet(KEY)
    assert left is not None
    assert left <= 0
    # A server that lags behind our own write proves nothing, and is asked again later.
    assert not cache.settle(KEY, {"pods": 9})
    assert cache.unmet(KEY) == EXPECTATION_SECONDS
    assert cache.settle(KEY, {"pods": 10})
    assert cache.unmet(KEY) is None


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["12", "34"]), st.booleans()),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_any_order_of_events_ends_in_the_same_view(
    history: list[tuple[str, str, bool]], order: Any
) -> None:
    """Per UID the events stay in order, as a watch promises; between UIDs they may mix."""
    streams: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    alive: dict[str, str] = {}
    generation = 0
    for version, (name, _, delete) in enumerate(history, start=1):
        if delete and name in alive:
            uid = alive.pop(name)
            streams[uid].append(("DELETED", pod(name, uid, version)))
        elif name in alive:
            streams[alive[name]].append(("MODIFIED", pod(name, alive[name], version)))
        else:
            generation += 1
            alive[name] = f"uid{generation}"
            streams[alive[name]] = [("ADDED", pod(name, alive[name], version))]
    cache = ObjectCache()
    queues = [events for events in streams.values() if events]
    while queues:
        chosen = order.choice(queues)
        event, body = chosen.pop(0)
        cache.observe("pods", event, body)
        queues = [events for events in queues if events]
    assert names(cache) == sorted(alive.items())


def test_what_changed_since_is_told_by_uid(cache: ObjectCache) -> None:
    cache.observe("pods", None, pod("a", "uid-a", 1))
    before = cache.changes("pods")
    assert cache.changed_since("pods", before) == set()
    cache.observe("pods", None, pod("b", "uid-b", 2))
    cache.observe("pods", "DELETED", pod("a", "uid-a", 3))
    cache.observe("services", None, pod("c", "uid-c", 4))
    assert cache.changed_since("pods", before) == {"uid-a", "uid-b"}
    assert cache.by_uid("pods", "uid-a") is None
    assert cache.by_uid("pods", "uid-b") is not None


def test_changes_too_long_ago_are_not_told_apart(cache: ObjectCache) -> None:
    for number in range(5_000):
        cache.observe("pods", None, pod("a", "uid-a", number + 1))
    assert cache.changed_since("pods", 4_990) == {"uid-a"}
    assert cache.changed_since("pods", 0) is None
