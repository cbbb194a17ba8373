"""The values that a plan is made of: what to do to which object, and why.

Plain data for the executor, which adds nothing. Does not know how they are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tilefleet_operator.api import FIELD_MANAGER
from tilefleet_operator.desired import ADMIN_PORT
from tilefleet_operator.reasons import Event
from tilefleet_operator.status import Telemetry

# Relabelling needs its own manager: an apply by the first manager that names only labels would
# give up, and so remove, every other field of the pod.
DRAIN_FIELD_MANAGER = f"{FIELD_MANAGER}-drain"


@dataclass(frozen=True)
class Apply:
    """Server-side apply `body` (force): a whole child object, or, where it carries metadata.uid,
    some fields of that very object, by a field manager of their own.
    """  # fmt: skip

    body: Mapping[str, Any]
    why: str
    field_manager: str = FIELD_MANAGER

    @property
    def kind(self) -> str:
        """Kind of the object."""
        return str(self.body["kind"])

    @property
    def name(self) -> str:
        """Name of the object."""
        return str(self.body["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Namespace of the object."""
        return str(self.body["metadata"]["namespace"])


@dataclass(frozen=True)
class Delete:
    """Delete a pod with the precondition that its UID is still `uid`."""

    name: str
    namespace: str
    uid: str
    why: str
    kind: str = "Pod"


@dataclass(frozen=True)
class Drain:
    """Take a pod out of the Service, then tell its worker to finish.

    First server-side apply `body` (force, field_manager); it carries metadata.uid, so that another
    pod of the same name is never touched. Then POST http://<ip>:<port>/drain with
    {"timeout_seconds": timeout_seconds}; a failure of the POST is logged and repeated by a later
    plan, never an error of the reconcile.
    """

    name: str
    namespace: str
    uid: str
    ip: str | None
    body: Mapping[str, Any]
    timeout_seconds: float
    why: str
    port: int = ADMIN_PORT
    field_manager: str = DRAIN_FIELD_MANAGER
    kind: str = "Pod"


Action = Apply | Delete | Drain


@dataclass(frozen=True)
class Plan:
    """What to do now.

    actions: in order. status: the whole new /status, None when nothing changed. requeue_after:
    seconds until the plan may change although nothing is observed to change, None when never.
    events: (type, reason, message) of transitions, for the Events of the object. decision: code of
    why the fleet has its size (autoscale.CODES), empty without one. telemetry: what was measured.
    """

    actions: tuple[Action, ...] = ()
    status: Mapping[str, Any] | None = None
    requeue_after: float | None = None
    events: tuple[Event, ...] = ()
    decision: str = ""
    telemetry: Telemetry = field(default_factory=Telemetry)
