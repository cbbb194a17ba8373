"""The watch's echo of a status that we wrote, told from news.

A status that no plan reads back needs no plan when the watch shows it: half of all plans under a
stream of changes. An event is an echo only when it holds that very status for the very generation
of the spec that it answers; anything else in between makes it news. It does not know what a status
means.
"""

from collections.abc import Mapping
from typing import Any

Key = tuple[str, str]


class Echoes:
    """Statuses under way, at most one a fleet."""

    def __init__(self) -> None:
        self._foreseen: dict[Key, tuple[object, ...]] = {}

    def foresee(self, key: Key, body: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        """This status is about to be written, from a plan for the object as it is in ``body``."""
        self._foreseen[key] = (*_identity(body), status)

    def forget(self, key: Key) -> None:
        """Whatever comes next is news."""
        self._foreseen.pop(key, None)

    def is_one(self, key: Key, body: Mapping[str, Any]) -> bool:
        """Whether the object brings nothing but the status foreseen. Each counts once."""
        foreseen = self._foreseen.pop(key, None)
        return foreseen == (*_identity(body), body.get("status"))


def _identity(body: Mapping[str, Any]) -> tuple[object, ...]:
    metadata = body["metadata"]
    return metadata["uid"], metadata.get("generation"), metadata.get("deletionTimestamp")
