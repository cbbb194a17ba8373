"""decide(): worked values of the capacity model, load through time, and what absence does."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator.builders import NOW, history, stats, steps_of
from tests.operator.engine_model import OUTPUT, PROMPT, run
from tilefleet_operator.autoscale import Decision, Policy, decide
from tilefleet_operator.load import arrival_rate, request_mix, saturated_capacity, series
from tilefleet_operator.observed import History, Step
from tilefleet_operator.throughput import MIN_STEPS, StepModel, fit_steps

WORKED = StepModel(a=0.012, b=8.3e-5, c=3e-5, d=4e-8)
POLICY = Policy(
    current=1,
    minimum=1,
    maximum=3,
    target=0.85,
    down_window=20.0,
    down_percent=50,
    down_interval=5.0,
)


@pytest.mark.parametrize(
    ("computed", "cached", "output", "work", "kv", "batch"),
    [
        (1000, 0, 300, 0.10580, 0.9020, 0.8827),
        (5000, 0, 200, 0.46180, 0.9314, 0.9801),
        (200, 800, 300, 0.03940, 0.7741, 0.7370),
        (200, 0, 1000, 0.07460, 0.7617, 0.6141),
    ],
)
def test_worked_values(
    computed: float, cached: float, output: float, work: float, kv: float, batch: float
) -> None:
    assert WORKED.work(computed, cached, output) == pytest.approx(work, abs=5e-6)
    assert WORKED.kv_limit(computed, cached, output, 400_000) == pytest.approx(kv, abs=5e-5)
    assert WORKED.batch_limit(computed, cached, output, 256) == pytest.approx(batch, abs=5e-5)


def test_replica_limit_is_the_smaller_cap_over_the_work() -> None:
    rate = WORKED.requests_per_second(200, 800, 300, kv_tokens=400_000, max_concurrent=256)
    assert rate == pytest.approx(0.7370 / 0.03940, rel=1e-3)
    assert (
        StepModel(0.01, 0, 0, 0).requests_per_second(1, 0, 1, kv_tokens=1e6, max_concurrent=8)
        is None
    )


def test_little_s_law_holds_at_the_batch_limit() -> None:
    """At u_bat exactly max_concurrent requests run: N = r O tau with tau = a / (1 - u)."""
    share = WORKED.batch_limit(1000, 0, 300, 256)
    rate = share / WORKED.work(1000, 0, 300)
    assert rate * 300 * WORKED.a / (1 - share) == pytest.approx(256)


@settings(deadline=None)
@given(st.floats(1e-3, 0.1), st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-3), st.floats(1e-9, 1e-6))
def test_fit_finds_the_coefficients_of_exact_steps(a: float, b: float, c: float, d: float) -> None:
    model = fit_steps(steps_of(a, b, c, d))
    assert model is not None
    for step in steps_of(a, b, c, d):
        predicted = (
            model.a
            + model.b * step.prefill_tokens
            + model.c * step.sequences
            + model.d * step.kv_tokens
        )
        assert predicted == pytest.approx(step.seconds, rel=0.02)


def test_fit_never_answers_with_a_negative_cost() -> None:
    """Steps that get faster with more sequences are noise; the cost of a sequence is then 0."""
    steps = [Step(0.02 - 1e-5 * n, 0, n, 100 * n) for n in range(1, 65)]
    model = fit_steps(steps)
    assert model is not None
    assert min(model.a, model.b, model.c, model.d) >= 0
    assert model.a > 0


def test_fit_ignores_a_stall_and_needs_enough_steps() -> None:
    steps = steps_of(0.01, 1e-5, 1e-5, 1e-8)
    stalled = fit_steps((*steps, Step(60.0, 10, 5, 5000)))
    assert stalled is not None
    assert stalled.a == pytest.approx(0.01, rel=0.05)
    assert fit_steps(steps[: MIN_STEPS - 1]) is None


def desired(log: list[tuple[float, Decision]], at: float) -> int:
    return next(decision.desired for now, decision in log if now >= at)


def test_load_raises_one_to_three_and_its_end_lowers_them_within_a_minute() -> None:
    """A replica does 0.67 requests/s; 1.8/s for a minute need 3, then nothing needs 1."""
    log = run([(30, 0.0), (90, 1.8)], POLICY, seconds=180)
    assert {d.desired for t, d in log if t < 30} == {1}
    up = next(t for t, d in log if d.desired == 3)
    assert up <= 30 + 20
    assert {d.desired for t, d in log if up <= t < 90} == {3}
    down = next(t for t, d in log if t > 90 and d.desired == 1)
    assert down <= 90 + 60
    assert {d.desired for t, d in log if t >= down} == {1}, "it must not flap"
    steps = [d.desired for _, d in log]
    assert sum(a != b for a, b in pairwise(steps)) <= 4


def test_observed_capacity_is_what_a_full_replica_does() -> None:
    log = run([(120, 1.8)], POLICY, seconds=60)
    full = 4 * 10.0 * (OUTPUT + PROMPT) / OUTPUT
    found = [d for _, d in log if d.capacity_source == "Observed"]
    assert found
    assert found[-1].capacity_tokens_per_second == pytest.approx(full, rel=0.25)


def test_idle_fleet_keeps_the_stored_capacity() -> None:
    """Evidence that fades after the load must not cause a write to the status."""
    log = run([(60, 1.8)], POLICY, seconds=400)
    idle = [d for t, d in log if t > 90]
    assert {d.capacity_source for d in idle} == {"Stored"}
    assert len({d.capacity_tokens_per_second for d in idle}) == 1


def test_light_load_never_scales_up() -> None:
    log = run([(300, 0.3)], POLICY, seconds=300)
    assert {d.desired for _, d in log} == {1}


def test_steady_load_does_not_flap() -> None:
    for rate in (0.5, 1.0, 1.5, 2.0, 3.0):
        log = run([(600, rate)], replace(POLICY, maximum=8), seconds=300)
        tail = [d.desired for t, d in log if t >= 120]
        changes = sum(a != b for a, b in pairwise(tail))
        assert changes <= 2, (rate, tail)


def test_silence_holds_whatever_the_load() -> None:
    log = run([(200, 1.8)], POLICY, seconds=200, silent=(80, 160))
    held = {d.desired for t, d in log if 80 <= t < 160}
    assert held == {3}
    assert all("holding" in d.reason for t, d in log if 82 <= t < 160)


def test_one_silent_replica_counts_like_its_peers_and_blocks_shrinking() -> None:
    frames = [(2.0 * i, {"a": stats(arrivals=i, completions=i, generated_tokens=40 * i)})
              for i in range(30)]  # fmt: skip
    policy = replace(POLICY, current=3, ready=("a", "b"), stored_capacity=1000.0)
    both = decide(history(*frames), policy, NOW + 58)
    alone = decide(history(*frames), replace(policy, ready=("a",)), NOW + 58)
    assert both.demand_tokens_per_second == pytest.approx(2 * alone.demand_tokens_per_second)  # type: ignore[operator]
    assert (both.desired, both.missing, both.fresh) == (3, 1, False)
    assert alone.desired < 3


def test_nothing_is_decided_before_anything_is_known() -> None:
    empty = decide(History(), replace(POLICY, current=2), NOW)
    assert (empty.desired, empty.reason) == (2, "no replica is ready; holding")
    silent = decide(History(), replace(POLICY, current=2, ready=("a",)), NOW)
    assert (silent.desired, silent.demand_tokens_per_second) == (2, None)
    frames = [(2.0 * i, {"a": stats(arrivals=i)}) for i in range(10)]
    learning = decide(history(*frames), replace(POLICY, ready=("a",)), NOW + 18)
    assert "learning" in learning.reason


def test_answer_older_than_ten_seconds_is_silence() -> None:
    frames = [(2.0 * i, {"a": stats(arrivals=i)}) for i in range(10)]
    stale = decide(history(*frames), replace(POLICY, ready=("a",)), NOW + 30)
    assert stale.missing == 1


def test_new_leader_does_not_take_old_totals_for_load() -> None:
    old = {"a": stats(arrivals=100_000, generated_tokens=4_000_000, completions=100_000)}
    later = {**old, "b": stats(arrivals=90_000, generated_tokens=1, completions=9)}
    totals = series(history((0, old), (2, later), (12, later)))
    assert arrival_rate(totals, NOW + 12, 60) == 0.0


def test_restarted_and_new_processes_count_from_zero() -> None:
    first = {"a": stats(arrivals=50)}
    then = {"a": stats(arrivals=5, uptime_seconds=1.0), "b": stats(arrivals=7, uptime_seconds=1.0)}
    totals = series(history((0, first), (10, then)))
    assert totals.totals[-1]["arrivals"] == 12
    gone = series(history((0, first), (10, then), (12, {})))
    assert gone.totals[-1]["arrivals"] == 12


def test_mix_counts_running_requests_as_half_done() -> None:
    first = {"a": stats()}
    then = {"a": stats(arrivals=14, completions=8, running=4, prompt_tokens_computed=240,
                       prompt_tokens_cached=120, generated_tokens=400)}  # fmt: skip
    mix = request_mix(series(history((0, first), (10, then))), NOW + 10, 20)
    assert mix is not None
    assert (mix.computed, mix.cached, mix.output) == (20, 10, 40)


def test_burst_is_seen_in_ten_seconds_and_noise_is_not() -> None:
    quiet = [(2.0 * i, {"a": stats(arrivals=i)}) for i in range(31)]
    burst = [(60 + 2.0 * i, {"a": stats(arrivals=30 + 10 * i)}) for i in range(1, 6)]
    totals = series(history(*quiet, *burst))
    assert arrival_rate(totals, NOW + 70, 60) == pytest.approx(5.0)
    assert arrival_rate(totals, NOW + 60, 60) == pytest.approx(0.5)
    few = [(60 + 2.0 * i, {"a": stats(arrivals=30 + i + (i > 2))}) for i in range(1, 6)]
    assert arrival_rate(series(history(*quiet, *few)), NOW + 70, 60) < 0.6


def test_two_arrivals_in_the_first_two_seconds_are_no_rate_of_one() -> None:
    totals = series(history((0, {"a": stats()}), (2, {"a": stats(arrivals=2)})))
    assert arrival_rate(totals, NOW + 2, 60) == pytest.approx(0.2)


def test_capacity_needs_evidence_and_a_full_replica() -> None:
    def at(second: float, waiting: int) -> tuple[float, dict[str, object]]:
        wait = 2.0 if waiting else 0.0
        return second, {"a": stats(generated_tokens=int(100 * second), running=2, waiting=waiting,
                                   oldest_wait_seconds=wait)}  # fmt: skip

    full = history(*(at(2.0 * i, 3) for i in range(5)))  # type: ignore[arg-type]
    assert saturated_capacity(full, NOW + 8) == pytest.approx(100.0)
    assert saturated_capacity(full, NOW + 200) is None
    idle = history(*(at(2.0 * i, 0) for i in range(5)))  # type: ignore[arg-type]
    assert saturated_capacity(idle, NOW + 8) is None
    brief = history(at(0, 3), at(2, 3))  # type: ignore[arg-type]
    assert saturated_capacity(brief, NOW + 2) is None


def test_predicted_capacity_sizes_a_fleet_that_was_never_full() -> None:
    """12 requests/s of (1000, 300) need 12 S / (0.85 limit) replicas of the worked model."""
    result = History()
    for i in range(40):
        count = 24 * i
        answer = stats(
            arrivals=count,
            completions=count,
            prompt_tokens_computed=1000 * count,
            generated_tokens=300 * count,
            running=50,
            steps=steps_of(0.012, 8.3e-5, 3e-5, 4e-8),
        )
        counters = replace(answer.counters, steps=64 * (i + 1))
        result = result.add(NOW + 2 * i, {"a": replace(answer, counters=counters)})
    decision = decide(result, replace(POLICY, maximum=9, ready=("a",)), NOW + 78)
    assert decision.capacity_source == "Predicted"
    limit = min(WORKED.kv_limit(1000, 0, 300, 400_000), WORKED.batch_limit(1000, 0, 300, 256))
    needed = 12 * WORKED.work(1000, 0, 300) / (0.85 * limit)
    assert decision.desired == math.ceil(needed)


def test_growth_is_limited_by_step_and_maximum() -> None:
    frames = [(2.0 * i, {"a": stats(arrivals=200 * i, completions=200 * i,
                                    generated_tokens=8000 * i)}) for i in range(31)]  # fmt: skip
    policy = replace(POLICY, maximum=500, ready=("a",), stored_capacity=40.0)
    first = decide(history(*frames), policy, NOW + 60)
    assert (first.desired, first.recommended) == (9, 118)
    half = decide(history(*frames), replace(policy, current=40, up_percent=50), NOW + 60)
    assert half.desired == 60
    capped = decide(history(*frames), replace(policy, maximum=3), NOW + 60)
    assert capped.desired == 3
    assert capped.inputs["limits"] == "1..3"


def test_shrinking_waits_for_window_and_interval_and_says_for_how_long() -> None:
    idle = [(2.0 * i, {"a": stats()}) for i in range(31)]
    policy = replace(POLICY, current=8, maximum=8, ready=("a",), stored_capacity=40.0)
    young = decide(history(*idle[:5]), policy, NOW + 8)
    assert (young.desired, young.wait_seconds) == (8, 12.0)
    half = decide(history(*idle), policy, NOW + 60)
    assert half.desired == 4
    soon = decide(history(*idle), replace(policy, last_shrink=NOW + 58), NOW + 60)
    assert (soon.desired, soon.wait_seconds) == (8, 3.0)


def test_fleet_never_shrinks_while_requests_wait() -> None:
    waiting = {"a": stats(running=1, waiting=1, oldest_wait_seconds=5.0, generated_tokens=1)}
    frames = [(2.0 * i, waiting) for i in range(31)]
    policy = replace(POLICY, current=3, ready=("a",), stored_capacity=1e6)
    held = decide(history(*frames), policy, NOW + 60)
    assert (held.desired, held.reason) == (3, "requests wait; not shrinking")
    calm = [(2.0 * i, {"a": stats()}) for i in range(31)]
    assert decide(history(*calm), policy, NOW + 60).desired == 2


@settings(deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 10), st.integers(0, 10), st.floats(0, 500), st.floats(1, 500)
)
def test_limits_always_hold(
    current: int, low: int, spread: int, per_second: float, capacity: float
) -> None:
    frames = []
    for i in range(20):
        count = int(per_second * 2 * i)
        answer = stats(arrivals=count, completions=count, generated_tokens=40 * count)
        frames.append((2.0 * i, {"a": answer}))
    policy = replace(POLICY, current=current, minimum=low, maximum=low + spread, ready=("a",),
                     stored_capacity=capacity)  # fmt: skip
    decision = decide(history(*frames), policy, NOW + 38)
    assert low <= decision.desired <= low + spread
    assert decision.reason
