"""Events: one a transition, a Warning once in ten minutes, and never a flood."""

from typing import Any

import pytest

from tests.operator.builders import NOW, Clock
from tilefleet_operator.errors import Conflict, Forbidden
from tilefleet_operator.events import BURST, REFILL_SECONDS, REPEAT_SECONDS, EventPoster, Owner
from tilefleet_operator.resources import Resource
from tilefleet_operator.telemetry import Telemetry

OWNER = Owner("ns", "fleet", "cr-uid")


class Recorder:
    """Keeps what is created; fails with `error` when there is one."""

    def __init__(self) -> None:
        self.created: list[Any] = []
        self.error: Exception | None = None

    async def create(self, resource: Resource, body: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.created.append(body)
        return body


class Harness:
    def __init__(self, wall: Clock) -> None:
        self.api, self.telemetry, self.wall = Recorder(), Telemetry(), wall
        self.poster = self.fresh()

    def fresh(self) -> EventPoster:
        """A poster without memory: another process."""
        return EventPoster(self.api, self.telemetry, "me", self.wall, self.wall)  # type: ignore[arg-type]

    async def warn(self, message: str, owner: Owner = OWNER, moment: str = "1") -> None:
        await self.poster.post(owner, ("Warning", "WriteFailed", message), moment)

    def count(self, result: str) -> float:
        name = "tilefleet_operator_events_total"
        return self.telemetry.registry.get_sample_value(name, {"result": result}) or 0.0


@pytest.fixture
def harness() -> Harness:
    return Harness(Clock(NOW - NOW % REPEAT_SECONDS))


async def test_the_same_warning_is_posted_once_in_ten_minutes(harness: Harness) -> None:
    for moment in range(50):
        await harness.warn("quota", moment=str(moment))
    assert len(harness.api.created) == 1
    assert harness.count("held_back") == 49
    harness.wall.now += REPEAT_SECONDS
    await harness.warn("quota")
    names = {body["metadata"]["name"] for body in harness.api.created}
    assert len(names) == 2, "the name of an Event that still exists cannot be used again"


async def test_a_new_leader_names_the_same_event_the_same(harness: Harness) -> None:
    await harness.warn("quota")
    harness.poster = harness.fresh()
    await harness.warn("quota")
    first, second = harness.api.created
    assert first["metadata"]["name"] == second["metadata"]["name"]


async def test_texts_that_differ_each_time_are_bounded(harness: Harness) -> None:
    """A message with a version or a time in it gets past every comparison."""
    for number in range(200):
        await harness.warn(f"conflict at {number}")
    assert len(harness.api.created) == BURST
    await harness.warn("another fleet", Owner("ns", "other", "other-uid"))
    assert len(harness.api.created) == BURST + 1
    harness.wall.now += REFILL_SECONDS
    await harness.warn("one more")
    await harness.warn("and one too many")
    assert len(harness.api.created) == BURST + 2


async def test_an_event_that_failed_is_tried_again(harness: Harness) -> None:
    harness.api.error = Forbidden(403, "Forbidden", "no")
    await harness.warn("quota")
    harness.api.error = Conflict(409, "AlreadyExists", "")
    await harness.warn("quota")
    assert (harness.count("error"), harness.count("posted")) == (1, 1)
