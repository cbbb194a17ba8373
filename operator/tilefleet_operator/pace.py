"""Which workers are asked in this round: fleets sized by load always, fleets of fixed size slowly,
silent workers less and less often.

It remembers; it asks nobody itself.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tilefleet_operator.cache import Key
from tilefleet_operator.observed import PodView
from tilefleet_operator.polls import CALM_POLL_SECONDS

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 4.0, 60.0
"""A silent worker costs a whole time-out each time it is asked."""


@dataclass(frozen=True, slots=True)
class PollTarget:
    """Replicas of one fleet. urgent: its size follows load, or a replica drains."""

    pods: tuple[PodView, ...]
    urgent: bool


class Pace:
    """When which fleet was asked, and which workers are silent for how long."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._asked: dict[Key, tuple[float, frozenset[str]]] = {}
        self._silent: dict[str, tuple[int, float]] = {}

    def is_due(self, key: Key, target: PollTarget) -> bool:
        """Whether the fleet is asked now; one whose replicas changed always is. Remembers it."""
        now, uids = self.clock(), frozenset(pod.uid for pod in target.pods)
        last, before = self._asked.get(key, (float("-inf"), frozenset()))
        if not target.urgent and uids == before and now - last < CALM_POLL_SECONDS:
            return False
        self._asked[key] = (now, uids)
        return True

    def awake(self, pods: Sequence[PodView]) -> list[PodView]:
        """Those that are not left alone for their silence."""
        now = self.clock()
        return [pod for pod in pods if self._silent.get(pod.uid, (0, now))[1] <= now]

    def silent(self, uid: str) -> None:
        """It did not answer: leave it alone, each time twice as long."""
        count = self._silent.get(uid, (0, 0.0))[0]
        pause = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(count, 10))
        self._silent[uid] = (count + 1, self.clock() + pause)

    def answered(self, uid: str) -> None:
        """It speaks again."""
        self._silent.pop(uid, None)

    def forget(self, keys: Collection[Key], uids: Collection[str]) -> None:
        """Keep nothing beyond these."""
        for key in self._asked.keys() - set(keys):
            del self._asked[key]
        for uid in self._silent.keys() - set(uids):
            del self._silent[uid]
