"""kopf as a shell: its watch events fill the cache and mark keys dirty. Nothing else is kopf's.

No timers, daemons, indices or create/update handlers: they die silently after one failed patch, or
scale badly. It does not know what a reconcile does.
"""

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol

import kopf

from tilefleet_operator.api import GROUP, PLURAL, VERSION
from tilefleet_operator.cache import Key, ObjectCache, child_key
from tilefleet_operator.cluster import Cluster
from tilefleet_operator.login import Login
from tilefleet_operator.observed import LABEL_DEPLOYMENT
from tilefleet_operator.resources import CHILDREN, PODS

logger = logging.getLogger(__name__)

_TOKEN_LIFE = timedelta(minutes=5)


class Dirty(Protocol):
    """What is told of a key whose view changed."""

    def __call__(self, key: Key, *, urgent: bool = False) -> None:
        """Ask for a reconcile. urgent: a person waits for the answer."""


class Shell:
    """Handlers of one kopf operator.

    dirty: called with each key whose view changed. relisted: called when kopf lists again after a
    broken watch; deletions of the gap are then unknown until somebody lists and prunes.
    """

    def __init__(
        self,
        cluster: Cluster,
        login: Login,
        dirty: Dirty,
        relisted: Callable[[], None],
    ) -> None:
        self.cluster, self.login = cluster, login
        self.dirty, self.relisted = dirty, relisted

    @property
    def cache(self) -> ObjectCache:
        """Where events go."""
        return self.cluster.cache

    def registry(self) -> kopf.OperatorRegistry:
        """All handlers, in a registry of their own."""
        registry = kopf.OperatorRegistry()
        kopf.on.startup(registry=registry)(configure)
        kopf.on.login(registry=registry)(self._login)
        kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(self._deployment)
        for child in (PODS, *CHILDREN):
            handler = partial(self._child, child.plural)
            kopf.on.event(
                child.group, child.version, child.plural, id=child.plural, registry=registry
            )(handler)
        kopf.on.event("v1", "nodes", registry=registry)(self._node)
        return registry

    async def _login(self, **_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(
            server=self.login.server,
            ca_path=self.login.ca_path,
            insecure=self.login.insecure,
            token=self.login.token(),
            certificate_path=self.login.certificate_path,
            private_key_path=self.login.private_key_path,
            # kopf asks again at the end of this time, so that a renewed token is read.
            expiration=datetime.now(UTC) + _TOKEN_LIFE,
        )

    async def _deployment(self, event: Any, **_: Any) -> None:
        body = event["object"]
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        if self._observe(PLURAL, event) and not self.cluster.echoes.is_one(key, body):
            self.dirty(key, urgent=is_unanswered(body))

    async def _node(self, event: Any, **_: Any) -> None:
        """Heartbeats change a node's version, but not what placement reads of it."""
        before = self.cluster.nodes()
        if self._observe("nodes", event) and self.cluster.nodes() != before:
            for key in self.cluster.amd_keys():
                self.dirty(key)

    async def _child(self, plural: str, event: Any, **_: Any) -> None:
        changed = self._observe(plural, event)
        key = child_key(event["object"])
        if changed and key is not None:
            self.dirty(key)

    def _observe(self, plural: str, event: Mapping[str, Any]) -> bool:
        if event["type"] is None:
            self.relisted()
        return self.cache.observe(plural, event["type"], event["object"])


def is_unanswered(body: Mapping[str, Any]) -> bool:
    """Whether a fleet's spec is newer than what its status speaks of."""
    observed = (body.get("status") or {}).get("observedGeneration")
    return bool(body["metadata"].get("generation") != observed)


class _Unremembered(kopf.DiffBaseStorage):
    """Nothing is compared with a former state, so none is extracted: kopf copies each object deep
    for that with every event, which was a tenth of the operator's CPU under load."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return {}

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        return


async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
    """Settings of kopf: it posts nothing, discovers nothing, and notices a dead connection."""
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70
    settings.watching.chunk_size = 500
    for child in (PODS, *CHILDREN):
        selected = (child.group, child.version, child.plural)
        settings.watching.label_selectors[selected] = LABEL_DEPLOYMENT
    settings.persistence.diffbase_storage = _Unremembered()
    # These keep two kopf operators from fighting over one object, should a handler ever store.
    settings.persistence.finalizer = f"{GROUP}/operator"
