"""Listens to node autoscalers: lists their Events on pods that have no node.

It reads only, and asks nothing while every pod has a node. What the words mean is in reactions.py.
"""

from collections.abc import Mapping
from typing import Any

from tilefleet_operator.cache import Key
from tilefleet_operator.client import ApiClient
from tilefleet_operator.reactions import REASONS, Reaction, reactions
from tilefleet_operator.resources import EVENTS


class NodeAutoscalers:
    """What was heard last, by UID of the pod."""

    def __init__(self, api: ApiClient) -> None:
        self.api = api
        self.heard: dict[str, Reaction] = {}

    async def listen(self, waiting: Mapping[str, Key]) -> set[Key]:
        """Hear anew of the pods that wait (UID → key); returns the keys that it is news for.

        Raises ApiError.
        """
        events: list[Mapping[str, Any]] = []
        for namespace in sorted({namespace for namespace, _ in waiting.values()}):
            for reason in REASONS:
                selector = f"involvedObject.kind=Pod,reason={reason}"
                found = await self.api.list(EVENTS, namespace, field_selector=selector)
                events += found.items
        before = self.heard
        self.heard = {uid: word for uid, word in reactions(events).items() if uid in waiting}
        return {key for uid, key in waiting.items() if before.get(uid) != self.heard.get(uid)}
