"""Limits of API keys: answers in flight, tokens a minute, priority, shared salts; changed live."""

import threading

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilefleet_worker.errors import ConfigError
from tilefleet_worker.server.auth import KeyFile
from tilefleet_worker.server.budget import Budget, Budgets, KeyLimits
from tilefleet_worker.server.replies import ApiError

BODY = {"model": "tiny", "prompt": "p" * 40, "max_tokens": 8, "ignore_eos": True}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_answers_in_flight_are_bounded_and_come_back():
    budget = Budget(KeyLimits(max_inflight=3))
    budget.take(2, 10)
    with pytest.raises(ApiError) as caught:
        budget.take(2, 10)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    budget.take(1, 10)
    budget.settle(2, 5)
    budget.take(2, 10)
    with pytest.raises(ApiError) as caught:
        budget.take(4, 10)  # this can never be: no reason to come back
    assert (caught.value.status, caught.value.param) == (400, "n")


def test_tokens_are_made_up_for_before_the_next_request():
    clock = Clock()
    budget = Budget(KeyLimits(tokens_per_minute=60), clock)
    budget.take(1, 50)
    budget.settle(1, 40)  # 30 more than there were
    with pytest.raises(ApiError) as caught:
        budget.take(1, 1)
    assert caught.value.retry_after_seconds == 31
    clock.now += 30.5
    budget.take(1, 1)
    clock.now += 10_000  # a minute's worth can be saved up, and no more
    budget.take(1, 60)
    with pytest.raises(ApiError):
        budget.take(1, 1)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60), st.floats(0, 20)), max_size=60),
    st.integers(1, 600),
)
def test_over_any_time_a_key_gets_its_rate_and_one_overdraft(uses, rate):
    clock = Clock()
    budget = Budget(KeyLimits(tokens_per_minute=rate), clock)
    spent, last = 0, 0
    for prompt, answer, pause in uses:
        clock.now += pause
        try:
            budget.take(1, prompt)
        except ApiError:
            continue
        budget.settle(1, answer)
        assert spent < rate + clock.now * rate / 60 + 1e-6
        last = prompt + answer
        spent += last
    assert budget.num_inflight == 0
    assert spent <= rate + clock.now * rate / 60 + last + 1e-6


def test_a_change_of_limits_keeps_what_is_owed_and_in_flight():
    budgets = Budgets()
    first = budgets.of("a", KeyLimits(max_inflight=2, tokens_per_minute=10))
    first.take(2, 500)
    second = budgets.of("a", KeyLimits(max_inflight=3, tokens_per_minute=11))
    assert second is first
    assert second.num_inflight == 2
    with pytest.raises(ApiError):
        second.take(1, 1)  # still in debt
    assert budgets.of("b", KeyLimits()) is not first
    budgets.of("b", KeyLimits()).take(999, 10**9)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alice k1 max_inflight=0", ["max_inflight=0", "from 1 to"]),
        ("alice k1 max_inflight=x", ["max_inflight=x"]),
        ("alice k1 priority=-1001", ["priority=-1001", "-1000 to 1000"]),
        ("alice k1 salt=", ["'salt='"]),
        ("alice k1 colour=red", ["'colour=red'", "tokens_per_minute"]),
        ("sk-1 priority=1", ["needs an id"]),
        ("a=b sk-1", ["needs an id"]),
    ],
)
def test_a_bad_line_is_a_configuration_error_without_the_key(tmp_path, line, words):
    path = tmp_path / "keys"
    path.write_text(line)
    with pytest.raises(ConfigError) as caught:
        KeyFile(path)
    assert all(word in str(caught.value) for word in words)
    assert "k1" not in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_a_mistake_in_a_running_worker_leaves_the_old_keys(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text("alice k1 max_inflight=2\nbob k2")
    keys = KeyFile(path)
    path.write_text("alice k1 max_inflight=many\n")
    for _ in range(3):
        assert keys.identify("k1").limits == KeyLimits(max_inflight=2)
    assert keys.identify("k2").id == "bob"
    assert len([r for r in caplog.records if "old keys stay" in r.message]) == 1
    path.write_text("alice k1 max_inflight=77\n")
    assert keys.identify("k1").limits == KeyLimits(max_inflight=77)
    assert keys.identify("k2") is None


@pytest.fixture
def keyed(start_worker, tmp_path):
    path = tmp_path / "keys"
    path.write_text(
        "slow k-slow tokens_per_minute=60\nfew k-few max_inflight=1\nlow k-low priority=5\n"
        "a k-a salt=team\nb k-b salt=team\n"
    )
    return start_worker("--api-key-file", str(path), step_seconds=0.005).wait_ready(), path


def post(worker, key, **fields):
    headers = {"Authorization": f"Bearer {key}"}
    url = worker.api + "/v1/completions"
    return httpx.post(url, json=BODY | fields, headers=headers, timeout=120)


def test_limits_hold_over_http_and_change_with_the_file(keyed):
    worker, path = keyed
    assert post(worker, "k-slow", max_tokens=100).status_code == 200
    refused = post(worker, "k-slow")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded")
    assert error["type"] == "rate_limit_error"
    assert 60 < int(refused.headers["retry-after"]) <= 120
    page = httpx.get(worker.admin + "/metrics").text
    assert 'limit_rejections_total{limit="rate_limit_exceeded"} 1.0' in page

    long = threading.Thread(target=post, args=(worker, "k-few"), kwargs={"max_tokens": 450})
    long.start()
    worker.wait(lambda: worker.stats()["gauges"]["running"] == 1)
    assert post(worker, "k-few").status_code == 429
    assert post(worker, "k-a").status_code == 200  # nobody else's business
    long.join()
    assert post(worker, "k-few").status_code == 200
    assert post(worker, "k-few", n=2).json()["error"]["param"] == "n"

    assert post(worker, "k-low").status_code == 200
    assert post(worker, "k-low", priority=9).status_code == 200
    denied = post(worker, "k-low", priority=4)
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "priority_not_allowed")

    def cached(key):
        usage = post(worker, key, prompt="t" * 64).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached("k-a"), cached("k-b"), cached("k-low")] == [0, 48, 0]

    path.write_text("slow k-slow\n")
    assert post(worker, "k-slow").status_code == 200
    assert post(worker, "k-few").status_code == 401
