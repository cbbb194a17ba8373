"""AMD devices asked for on each node, kept up to date pod by pod.

With a thousand pods, counting them all for each plan would cost more than the plan. Does not know
where pods are seen.
"""

from __future__ import annotations

from collections.abc import Mapping

from tilefleet_operator.observed import PodView, held_devices

Use = Mapping[str, Mapping[str, float]]
"""Node name → resource name → devices."""


class DeviceTally:
    """Devices by node and resource. `use` is never mutated: who holds it keeps what was true."""

    def __init__(self) -> None:
        self.use: Use = {}
        self._held: dict[str, tuple[str, tuple[tuple[str, float], ...]]] = {}

    def put(self, uid: str, pod: PodView | None) -> None:
        """Count a pod as it is now; None for one that is gone."""
        before = self._held.get(uid)
        devices = held_devices(pod) if pod is not None else ()
        after = (str(pod.node), devices) if pod is not None and devices else None
        if before == after:
            return
        if before is not None:
            self._add(*before, -1.0)
            del self._held[uid]
        if after is not None:
            self._add(*after, 1.0)
            self._held[uid] = after

    def _add(self, node: str, devices: tuple[tuple[str, float], ...], sign: float) -> None:
        used = dict(self.use.get(node, {}))
        for name, amount in devices:
            used[name] = used.get(name, 0.0) + sign * amount
        left = {name: amount for name, amount in used.items() if amount}
        others = {name: held for name, held in self.use.items() if name != node}
        self.use = {**others, node: left} if left else others
