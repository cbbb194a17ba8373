"""History.add(): its running sums equal a walk over all polls, whatever replicas did meanwhile."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator.builders import NOW, stats
from tilefleet_operator.load import saturated_capacity, series
from tilefleet_operator.observed import WorkerStats
from tilefleet_operator.polls import HISTORY_SECONDS, History

Polls = list[tuple[float, dict[str, WorkerStats]]]


@st.composite
def polls(draw: st.DrawFn) -> Polls:
    """Up to 40 polls of up to three replicas that grow, restart, fall silent and come back."""
    totals: dict[str, tuple[float, int, int]] = {}  # process start, arrivals, tokens
    now, found = 0.0, []
    for _ in range(draw(st.integers(1, 40))):
        now += draw(st.sampled_from([2.0, 2.0, 2.0, 7.5, 300.0]))
        answers = {}
        for uid in ("a", "b", "c"):
            what = draw(st.sampled_from(["grow", "grow", "grow", "silent", "restart", "full"]))
            began, arrivals, tokens = totals.get(uid, (-1000.0, 100, 5000))
            if what == "restart":
                began, arrivals, tokens = now - 1.0, 0, 0
            arrivals += draw(st.integers(0, 9))
            tokens += draw(st.integers(0, 400))
            totals[uid] = (began, arrivals, tokens)
            if what == "silent":
                continue
            full = {"waiting": 3, "oldest_wait_seconds": 2.0} if what == "full" else {}
            answers[uid] = stats(
                arrivals=arrivals, generated_tokens=tokens, uptime_seconds=now - began,
                running=draw(st.integers(0, 4)), max_concurrent=4, **full,
            )  # fmt: skip
        found.append((NOW + now, answers))
    return found


def walked_arrivals(walk: Polls) -> float:
    """Arrivals over all polls, counted from scratch; a process older than the view starts at its
    first total."""
    total, seen = 0.0, dict[str, tuple[float, WorkerStats]]()
    for number, (now, answers) in enumerate(walk):
        window = [time for time, _ in walk[:number] if time >= now - HISTORY_SECONDS]
        start = min(window, default=now)
        for uid, sample in answers.items():
            held = seen.get(uid)
            known = held is not None and held[0] >= now - HISTORY_SECONDS
            before = held[1].counters.arrivals if held is not None and known else 0
            if known or sample.uptime_seconds < now - start:
                value = sample.counters.arrivals
                total += value - before if value >= before else value
            seen[uid] = (now, sample)
        seen = {uid: held for uid, held in seen.items() if held[0] >= now - HISTORY_SECONDS}
    return total


def walked_capacity(walk: Polls, now: float) -> float | None:
    """Mean tokens per second of full replicas, by a walk over all pairs of polls."""
    tokens = time = evidence = 0.0
    for (then, before), (later, after) in pairwise(walk):
        age = now - later
        if age > 120:
            continue
        for uid, sample in after.items():
            old = before.get(uid)
            full = [s for s in (old, sample) if s is not None and (
                s.gauges.waiting or s.gauges.running >= 0.9 * 4)]  # fmt: skip
            if old is None or len(full) < 2:
                continue
            value = sample.counters.generated_tokens
            growth = value - old.counters.generated_tokens
            weight = 0.5 ** (age / 30)
            tokens += weight * (growth if growth >= 0 else value)
            time += weight * (later - then)
            evidence += later - then
    return tokens / time if evidence >= 4 and tokens > 0 else None


@settings(deadline=None, max_examples=40)
@given(polls())
def test_running_sums_equal_a_walk_over_all_polls(walk: Polls) -> None:
    history = History()
    for number, (now, answers) in enumerate(walk, 1):
        history = history.add(now, answers)
        assert history.frames[-1].totals["arrivals"] == walked_arrivals(walk[:number])
        capacity = walked_capacity(walk[:number], now)
        found = saturated_capacity(history, now)
        assert (found is None) == (capacity is None)
        assert found is None or found == pytest.approx(capacity)
        assert history.frames[0].time >= now - HISTORY_SECONDS
        assert history.latest.keys() == answers.keys()


@settings(deadline=None)
@given(polls())
def test_totals_never_fall(walk: Polls) -> None:
    history = History()
    for now, answers in walk:
        history = history.add(now, answers)
    for before, after in pairwise(series(history).totals):
        assert all(after[key] >= before[key] for key in before if key != "running")


def test_answers_of_replicas_that_are_gone_are_not_kept_for_ever() -> None:
    history = History().add(NOW, {"a": stats()})
    history = history.add(NOW + HISTORY_SECONDS + 1, {"b": stats()})
    assert list(history.known) == ["b"]


def test_steps_of_an_answer_are_not_kept_with_it() -> None:
    sample = replace(stats(), steps=())
    history = History().add(NOW, {"a": sample})
    assert history.latest["a"].steps == ()
