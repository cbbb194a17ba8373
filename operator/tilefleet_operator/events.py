"""Posting Events on an InferenceDeployment, few enough to be read.

The same Warning is posted once in ten minutes, by whichever operator leads; an object has 25 Events
at once and one more in five minutes, as client-go's spam filter allows. What is held back is
counted. It does not know what an Event is about.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tilefleet_operator.api import API_VERSION, KIND
from tilefleet_operator.client import ApiClient
from tilefleet_operator.errors import ApiError, Conflict
from tilefleet_operator.rate import TokenBucket
from tilefleet_operator.reasons import Event
from tilefleet_operator.resources import EVENTS
from tilefleet_operator.telemetry import Telemetry

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 600
BURST, REFILL_SECONDS = 25, 300.0
# What is remembered; an object without a bucket has a full one.
_OBJECTS, _TEXTS = 5_000, 20_000
_MESSAGE_LIMIT = 1024  # the API server refuses a longer note


@dataclass(frozen=True, slots=True)
class Owner:
    """The InferenceDeployment that a plan is for."""

    namespace: str
    name: str
    uid: str

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.namespace, self.name


class EventPoster:
    """Posts Events through one API client. wall: seconds since the epoch."""

    def __init__(
        self,
        api: ApiClient,
        telemetry: Telemetry,
        identity: str,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.api, self.telemetry, self.identity = api, telemetry, identity
        self.wall, self.clock = wall, clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._posted: OrderedDict[str, None] = OrderedDict()

    async def post(self, owner: Owner, event: Event, moment: str) -> None:
        """Post one Event; failures are logged, never raised.

        moment: version of the object at a Normal transition. The same transition posted twice,
        because a reconcile was interrupted and is repeated, is one Event.
        """
        type_, reason, message = event
        if type_ == "Warning":
            moment = str(int(self.wall() // REPEAT_SECONDS))
        text = "\0".join((owner.uid, moment, reason, message))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if not self._admits(owner, digest):
            self.telemetry.events.labels("held_back").inc()
            return
        try:
            await self.api.create(EVENTS, self._body(owner, event, f"{owner.name}.{digest}"))
        except Conflict:
            pass  # posted before
        except ApiError as error:
            self.telemetry.events.labels("error").inc()
            self._posted.pop(digest, None)
            logger.warning("event %s was not posted: %s", reason, error)
            return
        self.telemetry.events.labels("posted").inc()

    def _admits(self, owner: Owner, digest: str) -> bool:
        """Whether this is news, and the object has room for it."""
        if digest in self._posted:
            return False
        bucket = self._buckets.get(owner.uid)
        if bucket is None:
            bucket = self._buckets[owner.uid] = TokenBucket(1 / REFILL_SECONDS, BURST, self.clock)
        self._buckets.move_to_end(owner.uid)
        if bucket.wait_seconds() > 0:
            return False
        bucket.take()
        self._posted[digest] = None
        if len(self._buckets) > _OBJECTS:
            self._buckets.popitem(last=False)
        if len(self._posted) > _TEXTS:
            self._posted.popitem(last=False)
        return True

    def _body(self, owner: Owner, event: Event, name: str) -> dict[str, Any]:
        type_, reason, message = event
        now = datetime.fromtimestamp(self.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"namespace": owner.namespace, "name": name},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": owner.namespace,
                "name": owner.name,
                "uid": owner.uid,
            },
            "type": type_,
            "reason": reason,
            "message": message[:_MESSAGE_LIMIT],
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": "tilefleet-operator"},
            "reportingComponent": "tilefleet.io/operator",
            "reportingInstance": self.identity[:128],
        }
