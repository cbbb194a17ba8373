"""Where replicas find room, over all options in order, and why the other nodes are refused.

The first option with room is taken. Everything is made over sorted nodes. Does not know pods, only
how many devices are in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from tilefleet_operator.accelerator import AcceleratorSpec
from tilefleet_operator.affinity import HOSTNAME_KEY
from tilefleet_operator.hardware import Nodes, NodeView, is_candidate
from tilefleet_operator.judgement import judge
from tilefleet_operator.options import NodeFit, Option, Placement
from tilefleet_operator.options import options as choice_options
from tilefleet_operator.partitions import labels_stale

Use = Mapping[str, Mapping[str, float]]
_NAMELESS = f"its labels do not tell the partition, and it has no label {HOSTNAME_KEY}"


@dataclass(frozen=True)
class Fit:
    """All options in order, and every AMD node that none of them accepts, sorted, with the reason.

    stale: nodes whose partition label contradicts Allocatable. mismatched: nodes refused for
    nothing but their partition mode.
    """

    options: tuple[Option, ...]
    refused: tuple[tuple[str, str], ...] = ()
    stale: tuple[tuple[str, str], ...] = ()
    mismatched: int = 0

    @property
    def devices(self) -> int:
        """Devices of one replica as the spec asks for it."""
        return self.options[0].count

    @cached_property
    def matching(self) -> tuple[NodeFit, ...]:
        """Nodes of any option, each once, by name."""
        found = {node.name: node for option in reversed(self.options) for node in option.matching}
        return tuple(found[name] for name in sorted(found))

    @property
    def replicas(self) -> int:
        """Replicas that fit, each whole on one node, all options taken in order."""
        space, count = _Space(self), 0
        for option in self.options:
            for node in option.matching:
                fits = space.free[node.name, option.resource] // option.count
                space.free[node.name, option.resource] -= fits * option.count
                count += fits
        return count

    def within(self, used: Use) -> Fit:
        """The same judgement with other devices in use: node name → resource → devices."""
        return replace(self, options=tuple(_within(option, used) for option in self.options))

    def arithmetic(self, replicas: int) -> str:
        """Why `replicas` fit or do not fit, as one sentence with the numbers of every option."""
        if len(self.options) == 1:
            return self.options[0].arithmetic(replicas) + self.refusals()
        parts = [f"{option.title}: {option.arithmetic(replicas)}" for option in self.options]
        return f"{self.replicas} of {replicas} replicas fit. {'. '.join(parts)}" + self.refusals()

    def refusals(self) -> str:
        """The refused nodes with their reasons, as the end of a sentence; empty without any."""
        named = ", ".join(f"{name} ({why})" for name, why in self.refused[:5])
        more = f" and {len(self.refused) - 5} more" if len(self.refused) > 5 else ""
        return f"; refused: {named}{more}" if named else ""


@dataclass(frozen=True)
class Waiting:
    """A pod that the scheduler found no node for.

    key, title: of the option it was made for. given_up: it waited long enough, and nobody brings a
    node for it.
    """

    uid: str
    key: str
    title: str
    given_up: bool = False


class _Space:
    """Devices that are still free while replicas are assigned one after the other."""

    def __init__(self, fit: Fit) -> None:
        self.free = {
            (node.name, option.resource): node.free
            for option in fit.options
            for node in option.matching
        }

    def take(self, option: Option) -> NodeFit | None:
        """The fullest node with room for one replica, its devices taken; None without room."""
        free = {node: self.free[node.name, option.resource] for node in option.matching}
        room = [node for node in option.matching if free[node] >= option.count]
        if not room:
            return None
        node = min(room, key=lambda node: (free[node], node.name))
        self.free[node.name, option.resource] -= option.count
        return node

    def first(self, options: Iterable[Option], packing: str) -> tuple[Placement, NodeFit] | None:
        """A place for one replica by the first option with room, and its node; None without."""
        for option in options:
            if node := self.take(option):
                return Placement(option, node.host if packing == "Pack" else ""), node
        return None


@dataclass(frozen=True)
class Move:
    """A waiting pod to be made anew, for other devices."""

    uid: str
    why: str
    placement: Placement


def assign(
    fit: Fit, waiting: Sequence[Waiting], count: int, packing: str
) -> tuple[list[Move], list[Placement]]:
    """Waiting pods that must be made anew for other devices, and places for `count` new replicas.

    A pod's demands cannot change, so one that waits for an option without room is replaced when
    another option has room, or by the next choice when nobody brings a node for its own. New
    replicas without room anywhere wait for the first option.
    """
    space, moves = _Space(fit), []
    for pod in waiting:
        own = next((option for option in fit.options if option.key == pod.key), None)
        if own is not None and space.take(own):
            continue
        found = space.first(fit.options, packing)
        if found is not None:
            place, node = found
            why = f"{pod.title} finds no node; {place.option.title} has room on {node.name}"
            moves.append(Move(pod.uid, why, place))
        elif pod.given_up and (other := _next_choice(fit, pod)):
            why = f"nobody brings a node for {pod.title}; {other.option.title} is tried next"
            moves.append(Move(pod.uid, why, other))
    placements = []
    for _ in range(count):
        found = space.first(fit.options, packing)
        placements.append(found[0] if found is not None else Placement(fit.options[0]))
    return moves, placements


def _next_choice(fit: Fit, pod: Waiting) -> Placement | None:
    """The first option of the choice after the pod's own, around; None with a single choice."""
    mine = (o.number for o in fit.options if pod.key == o.key or pod.title == o.title)
    count = fit.options[-1].number + 1
    wanted = (next(mine, 0) + 1) % count
    if count == 1:
        return None
    return Placement(next(option for option in fit.options if option.number == wanted))


def fit(accelerator: AcceleratorSpec, nodes: Iterable[NodeView], used: Use) -> Fit:
    """Judge every AMD node for every choice. used: node name → resource → devices others hold."""
    if isinstance(nodes, Nodes):
        question = ("fit", accelerator.model_dump_json())
        return nodes.recall(question, partial(_judged, accelerator, nodes)).within(used)
    return _judged(accelerator, nodes).within(used)


def _judged(accelerator: AcceleratorSpec, nodes: Iterable[NodeView]) -> Fit:
    """The judgement with every device free."""
    known = sorted((n for n in nodes if is_candidate(n)), key=lambda n: n.name)
    options: list[Option] = []
    reasons: dict[str, tuple[str, bool]] = {}
    for number, choice in enumerate(accelerator.choices):
        resource = accelerator.resource_name if number == 0 else ""
        judged = [judge(node, choice, accelerator, resource) for node in known]
        for one in judged:
            reasons.setdefault(one.node.name, (one.why, one.is_partition))
        options += choice_options(number, choice, judged, resource)
    accepted = {node.name for option in options for node in option.matching}
    left = [node.name for node in known if node.name not in accepted]
    refused = tuple((name, reasons[name][0] or _NAMELESS) for name in left)
    mismatched = sum(reasons[name][1] for name, _ in refused)
    stale = tuple((n.name, why) for n in known if (why := labels_stale(n)))
    return Fit(tuple(options), refused, stale, mismatched)


def unseen(accelerator: AcceleratorSpec) -> Placement:
    """What a replica demands where no node is known: the same for ever, so a revision holds it."""
    return Placement(fit(accelerator, (), {}).options[0])


def _within(option: Option, used: Use) -> Option:
    matching = tuple(_left(node, used.get(node.name), option.resource) for node in option.matching)
    return replace(option, matching=matching)


def _left(node: NodeFit, used: Mapping[str, float] | None, resource: str) -> NodeFit:
    """The node with what others leave of its devices; most nodes stay the object they are."""
    taken = used.get(resource, 0.0) if used else 0.0
    free = max(0, node.total - math.ceil(taken)) if taken else node.total
    if free == node.free:
        return node
    # Not replace(): this is asked for each node and plan, and replace() takes four times as long.
    return NodeFit(node.name, free, node.total, node.host, node.partition, node.bytes_per_device)
