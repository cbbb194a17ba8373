"""What operators asked of the API server, read from its audit log."""

import re
from collections.abc import Iterator
from datetime import datetime

from tests.operator.apiserver import MUTATING, ApiServer


def writes(api: ApiServer, user: str, position: int) -> Iterator[tuple[str, float]]:
    """(fleet, seconds since the epoch) of each write of an operator, Leases apart.

    position: of the log, from ApiServer.audit_position().
    """
    for entry in api.audit(position):
        reference = entry.get("objectRef") or {}
        if entry["verb"] not in MUTATING or reference.get("resource") == "leases":
            continue
        found = re.match(r"[a-z]+\d*", reference.get("name", ""))
        if entry["user"]["username"] == user and found:
            moment = datetime.fromisoformat(entry["requestReceivedTimestamp"])
            yield found[0], moment.timestamp()


def requests(api: ApiServer, user: str, position: int) -> int:
    """Requests of an operator about single objects: no lists, watches and Leases."""
    return sum(
        entry["user"]["username"] == user
        and entry["verb"] not in ("list", "watch")
        and (entry.get("objectRef") or {}).get("resource") != "leases"
        for entry in api.audit(position)
    )
