"""A fleet in bad weather: random events between the steps of the simulated world.

Pods fail, vanish and stop serving; nodes go down, get sick and come back; the spec walks, also to
a revision that never starts; sizes, bounds and pauses change. It decides nothing about the fleet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from tests.operator.builders import DEFAULTS, NOW, amd, manual, snapshot
from tests.operator.test_hardware import node
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.observed import PodView, device_use
from tilefleet_operator.plan import Plan, plan
from tilefleet_operator.simulation import World, advance, trace

Event = tuple[int, str, Any]

SPEC_A, SPEC_B, BROKEN = 100, 200, 666
"""engine.maxBatchTokens of the revisions; replicas of the last one never become ready."""
CALM_SECONDS = 1500


@dataclass
class Weather:
    """The user's present wishes, and what is wrong at present."""

    on_gpus: bool
    tokens: int = SPEC_A
    replicas: int = 2
    surge: int = 1
    unavailable: int = 0
    paused: bool = False
    unready: dict[str, tuple[float, float]] = field(default_factory=dict)
    down: dict[str, float] = field(default_factory=dict)
    sick: set[str] = field(default_factory=set)

    def deployment(self, status: Any) -> InferenceDeployment:
        """The object that the user has written last."""
        spec = {
            "engine": {"maxBatchTokens": self.tokens},
            "rollout": {
                "maxSurge": self.surge,
                "maxUnavailable": self.unavailable,
                "progressDeadline": "40s",
            },
            "paused": self.paused,
        }
        of = amd(self.replicas, 4, **spec) if self.on_gpus else manual(self.replicas, **spec)
        return replace(of, status=status)


EVENTS = st.one_of(
    st.tuples(st.integers(0, 90), st.just("fail"), st.integers(0, 9)),
    st.tuples(st.integers(0, 90), st.just("vanish"), st.integers(0, 9)),
    st.tuples(st.integers(0, 90), st.just("unready"), st.integers(0, 9)),
    st.tuples(st.integers(0, 90), st.just("tokens"), st.sampled_from([SPEC_A, SPEC_B, BROKEN])),
    st.tuples(st.integers(0, 90), st.just("replicas"), st.integers(0, 4)),
    st.tuples(
        st.integers(0, 90),
        st.just("bounds"),
        st.sampled_from([(1, 0), (0, 1), (2, 1), (0, 3), (3, 0), (1, 2)]),
    ),
    st.tuples(st.integers(0, 90), st.just("paused"), st.booleans()),
    st.tuples(st.integers(0, 90), st.just("down"), st.integers(0, 2)),
    st.tuples(st.integers(0, 90), st.just("sick"), st.integers(0, 2)),
    st.tuples(st.integers(0, 90), st.just("well"), st.integers(0, 2)),
)
storms = st.tuples(
    st.booleans(),
    st.lists(EVENTS, max_size=14),
    st.integers(2, 12),  # seconds until a replica is ready
    st.integers(1, 8),  # seconds that its last request takes
)


class Storm:
    """One world and its weather, step by step."""

    def __init__(self, on_gpus: bool, events: list[Event], start: int, drain: int) -> None:
        self.weather = Weather(on_gpus)
        self.events, self.start, self.drain = events, float(start), float(drain)
        nodes = tuple(replace(node("spx8"), name=f"n{i}") for i in range(3)) if on_gpus else ()
        self.world = World(snapshot(self.weather.deployment({}), nodes=nodes), NOW)

    def run(self, ticks: int = 100) -> Iterator[tuple[World, Plan]]:
        """Every moment of the storm with its plan."""
        for tick in range(ticks):
            for _, kind, argument in [event for event in self.events if event[0] == tick]:
                self._happen(kind, argument)
            self._settle()
            step = plan(self.world.snapshot, DEFAULTS, self.world.now)
            yield self.world, step
            self.world = advance(
                self.world, step, start_seconds=self.start, drain_seconds=self.drain
            )

    def calm(self, tokens: int, replicas: int) -> list[tuple[World, Plan]]:
        """The weather clears up; what the fleet then does until it rests."""
        self.weather.unready.clear()
        self.weather.down.clear()
        self.weather.sick.clear()
        self.weather.paused = False
        self.weather.tokens, self.weather.replicas = tokens, replicas
        self._settle()
        return trace(
            self.world, DEFAULTS,
            start_seconds=self.start, drain_seconds=self.drain, limit=CALM_SECONDS,
        )  # fmt: skip

    def _happen(self, kind: str, argument: Any) -> None:
        weather, found, now = self.weather, self.world.snapshot, self.world.now
        if kind in ("tokens", "replicas", "paused"):
            setattr(weather, kind, argument)
        elif kind == "bounds":
            weather.surge, weather.unavailable = argument
        elif kind in ("down", "sick"):
            name = f"n{argument}"
            weather.down.setdefault(name, now) if kind == "down" else weather.sick.add(name)
        elif kind == "well":
            weather.down.pop(f"n{argument}", None)
            weather.sick.discard(f"n{argument}")
        elif found.pods:
            victim = found.pods[argument % len(found.pods)]
            others = [pod for pod in found.pods if pod is not victim]
            if kind == "unready":
                weather.unready[victim.uid] = (now, now + 20)
            elif kind == "vanish":
                self._put(others)
            else:
                failed = replace(victim, phase="Failed", ready=False, reason="Evicted")
                self._put([*others, failed])

    def _put(self, pods: list[PodView]) -> None:
        found = replace(self.world.snapshot, pods=tuple(pods), device_use=device_use(tuple(pods)))
        self.world = World(found, self.world.now)

    def _settle(self) -> None:
        """Write what is wrong at present into the world."""
        weather, found, now = self.weather, self.world.snapshot, self.world.now
        broken = self._broken_revisions()
        pods = []
        for pod in found.pods:
            since = weather.down.get(pod.node or "")
            spell = weather.unready.get(pod.uid)
            if spell is not None and spell[0] <= now < spell[1]:
                since = spell[0]
            if pod.revision in broken:
                since = pod.created
            pods.append(replace(pod, ready=False, unready_since=since) if since else pod)
        nodes = tuple(
            replace(
                one,
                ready=one.name not in weather.down,
                ready_changed=weather.down.get(one.name, 0.0),
                conditions={"AMDGPUXgmi": "True"} if one.name in weather.sick else {},
            )
            for one in found.nodes
        )
        deployment = weather.deployment(found.deployment.status)
        self.world = World(
            replace(found, pods=tuple(pods), nodes=nodes, deployment=deployment), now
        )

    def _broken_revisions(self) -> set[str]:
        """Names of the revisions that were recorded with the broken spec."""
        return {
            body["metadata"]["labels"]["tilefleet.io/revision"]
            for (kind, _), body in self.world.snapshot.children.items()
            if kind == "ControllerRevision"
            and body["data"]["spec"]["engine"]["maxBatchTokens"] == BROKEN
        }
