"""The Lease, in virtual time, against an in-memory API server with compare-and-swap."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from tilefleet_operator.election import Election, LeaseTiming
from tilefleet_operator.errors import ApiError, Conflict, LeaseLost, NotFound


class Time:
    """A clock, and a sleep that moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.limit = float("inf")

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self.limit:
            raise TimeoutError("virtual time is over")


class FakeLeases:
    """One Lease with resourceVersions. ``broken``: what each request raises, after its limit."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.broken: ApiError | None = None
        self.broken_until = float("inf")
        self.writes = 0
        self.answers_lost = 0
        """How many of the next writes land without an answer."""

    async def read(self, timeout_seconds: float) -> dict[str, Any]:
        self._request(timeout_seconds)
        if self.lease is None:
            raise NotFound(404, "NotFound", "no such lease")
        return copy.deepcopy(self.lease)

    async def create(self, spec: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
        self._request(timeout_seconds)
        if self.lease is not None:
            raise Conflict(409, "AlreadyExists", "it exists")
        stored = self._store({"metadata": {"name": "lease"}, "spec": dict(spec)})
        return self._answer(stored, timeout_seconds)

    async def update(self, lease: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
        self._request(timeout_seconds)
        assert self.lease is not None
        if lease["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise Conflict(409, "Conflict", "modified")
        return self._answer(self._store(copy.deepcopy(dict(lease))), timeout_seconds)

    def _answer(self, stored: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        if self.answers_lost:
            self.answers_lost -= 1
            self.time.now += timeout_seconds
            raise UNREACHABLE
        return stored

    def _request(self, timeout_seconds: float) -> None:
        if self.broken is not None and self.time.now < self.broken_until:
            self.time.now += timeout_seconds
            raise self.broken

    def _store(self, lease: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        self.writes += 1
        lease["metadata"]["resourceVersion"] = str(self.version)
        self.lease = lease
        return copy.deepcopy(lease)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def leases(time: Time) -> FakeLeases:
    return FakeLeases(time)


def candidate(leases: FakeLeases, name: str) -> Election:
    return Election(leases, name, clock=leases.time.clock, sleep=leases.time.sleep)


UNREACHABLE = ApiError(0, "Unreachable", "no answer")


async def test_the_first_candidate_creates_the_lease(leases: FakeLeases) -> None:
    one = candidate(leases, "one")
    await one.acquire()
    assert one.is_leader()
    assert leases.lease is not None
    assert leases.lease["spec"]["holderIdentity"] == "one"
    assert leases.lease["spec"]["leaseDurationSeconds"] == 10


async def test_a_second_candidate_waits_while_the_first_renews(
    leases: FakeLeases, time: Time
) -> None:
    one, two = candidate(leases, "one"), candidate(leases, "two")
    await one.acquire()
    for _ in range(30):
        assert not await two._try_acquire()
        time.now += 2
        await one._renew()
    assert one.is_leader()
    assert not two.is_leader()


async def test_a_killed_leader_is_replaced_within_12_seconds(
    leases: FakeLeases, time: Time
) -> None:
    one, two = candidate(leases, "one"), candidate(leases, "two")
    await one.acquire()
    killed = time.now
    await two.acquire()
    assert two.is_leader()
    assert time.now - killed <= 12
    assert not one.is_leader()
    assert leases.lease is not None
    assert leases.lease["spec"]["leaseTransitions"] == 1


async def test_a_stale_record_of_before_counts_from_the_first_look(
    leases: FakeLeases, time: Time
) -> None:
    """The written times are never compared: a Lease a year old holds for 10 s of our own clock."""
    one, two = candidate(leases, "one"), candidate(leases, "two")
    await one.acquire()
    time.now += 31_536_000
    assert not await two._try_acquire()


@pytest.mark.parametrize("held_before", [False, True])
async def test_a_lease_taken_by_a_request_without_answer_is_ours_at_the_next_look(
    leases: FakeLeases, time: Time, held_before: bool
) -> None:
    """The create or update landed, its answer did not: the taker must not wait for itself."""
    one, two = candidate(leases, "one"), candidate(leases, "two")
    if held_before:
        await one.acquire()
        assert not await two._try_acquire()
        time.now += 10
    leases.answers_lost = 1
    begun = time.now
    await two.acquire()
    assert two.is_leader()
    assert leases.answers_lost == 0
    assert time.now - begun <= 3 + 2


async def test_release_lets_a_follower_in_at_once(leases: FakeLeases, time: Time) -> None:
    one, two = candidate(leases, "one"), candidate(leases, "two")
    await one.acquire()
    await one.release()
    assert not one.is_leader()
    before = time.now
    await two.acquire()
    assert time.now == before


async def test_a_leader_that_cannot_renew_stops_before_the_record_ends(
    leases: FakeLeases, time: Time
) -> None:
    one = candidate(leases, "one")
    await one.acquire()
    acquired = time.now
    leases.broken = UNREACHABLE
    with pytest.raises(LeaseLost):
        await one.hold()
    assert 7 <= time.now - acquired < 10


async def test_short_trouble_is_survived(leases: FakeLeases, time: Time) -> None:
    one = candidate(leases, "one")
    await one.acquire()
    leases.broken, leases.broken_until = UNREACHABLE, time.now + 4
    time.limit = time.now + 60
    with pytest.raises(TimeoutError):
        await one.hold()
    time.limit = float("inf")
    assert one.is_leader()


async def test_a_renewal_whose_answer_was_lost_is_no_loss(leases: FakeLeases, time: Time) -> None:
    """The update landed, its answer did not: the next one conflicts, and is repeated anew."""
    one = candidate(leases, "one")
    await one.acquire()
    assert leases.lease is not None
    await leases.update(leases.lease, 1)
    time.limit = time.now + 30
    with pytest.raises(TimeoutError):
        await one.hold()
    time.limit = float("inf")
    assert one.is_leader()


async def test_a_lease_taken_by_another_is_lost_at_once(leases: FakeLeases, time: Time) -> None:
    one = candidate(leases, "one")
    await one.acquire()
    assert leases.lease is not None
    taken = copy.deepcopy(leases.lease)
    taken["spec"]["holderIdentity"] = "two"
    await leases.update(taken, 1)
    before = time.now
    with pytest.raises(LeaseLost, match="two"):
        await one.hold()
    assert time.now - before <= 3
    assert not one.is_leader()


async def test_a_process_that_was_stopped_writes_nothing_afterwards(
    leases: FakeLeases, time: Time
) -> None:
    one = candidate(leases, "one")
    await one.acquire()
    assert one.guard() > 6.9
    time.now += 7.01
    with pytest.raises(LeaseLost, match="restart"):
        one.guard()


async def test_a_released_or_lost_lease_is_not_released_again(
    leases: FakeLeases, time: Time
) -> None:
    one = candidate(leases, "one")
    await one.acquire()
    time.now += 11
    writes = leases.writes
    await one.release()
    assert leases.writes == writes


async def test_renewals_are_one_write_in_two_seconds(leases: FakeLeases, time: Time) -> None:
    one = candidate(leases, "one")
    await one.acquire()
    writes, time.limit = leases.writes, time.now + 60
    with pytest.raises(TimeoutError):
        await one.hold()
    assert leases.writes - writes == 30


def test_the_timing_leaves_slack_for_a_write_under_way() -> None:
    timing = LeaseTiming()
    assert timing.renew_seconds + timing.request_seconds < timing.deadline_seconds
    assert timing.deadline_seconds < timing.duration_seconds
    assert timing.duration_seconds + timing.retry_seconds + timing.request_seconds < 20
