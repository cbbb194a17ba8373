"""plan(snapshot, defaults, now): every action that brings the cluster nearer to the spec, and why.

Pure: no client, clock or randomness. The executor performs the actions in the order given (drain,
delete, apply), then writes `status` to /status when it is not None. Does not know how children are
rendered (desired.py, children.py) and repaired (upkeep.py), how pods are chosen (fleet.py), drained
(draining.py) and counted (autoscale.py), nor how it is all reported (status.py, conditions.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tilefleet_operator import desired, devices, history, status
from tilefleet_operator.actions import Action, Apply, Delete, Drain, Plan
from tilefleet_operator.api import InferenceDeployment
from tilefleet_operator.autoscale import STALE_SECONDS, Decision, Policy, decide
from tilefleet_operator.balloons import balloons
from tilefleet_operator.capacity import shortage
from tilefleet_operator.children import children, names
from tilefleet_operator.conditions import Facts, conditions, unknown
from tilefleet_operator.desired import Defaults
from tilefleet_operator.draining import finish, leave
from tilefleet_operator.failures import Successor
from tilefleet_operator.fleet import Fleet, fleet
from tilefleet_operator.moves import Moves, Room, moves
from tilefleet_operator.observed import Snapshot
from tilefleet_operator.options import Placement
from tilefleet_operator.polls import CALM_POLL_SECONDS
from tilefleet_operator.protection import protections
from tilefleet_operator.rollout import progress
from tilefleet_operator.standstill import standstill
from tilefleet_operator.transitions import transitions
from tilefleet_operator.units import seconds
from tilefleet_operator.upkeep import conflicts, upkeep

__all__ = ["Action", "Apply", "Delete", "Drain", "Plan", "invalid", "plan"]

# How often load is looked at, and how often a draining replica.
MEASURE_SECONDS, DRAIN_POLL_SECONDS = 2.0, 1.0
CONFLICT_RETRY_SECONDS = 5.0


def plan(snapshot: Snapshot, defaults: Defaults, now: float) -> Plan:
    """The next step from what is observed towards what is wanted.

    now: seconds since the epoch. Empty for an object that is being deleted: owner references clean
    up. A paused object gets a status and nothing else.
    """
    deployment = snapshot.deployment
    if deployment.deleting:
        return Plan()
    known = history.revisions(snapshot.children, deployment.uid)
    revision, used = history.current(deployment, known, defaults)
    pods = fleet(snapshot, revision.name, now)
    decision = _decide(snapshot, pods, now)
    fit = devices.judged(snapshot, pods)
    wanted = children(deployment, decision.desired, defaults, snapshot.monitors_served)
    taken = conflicts(snapshot, wanted)
    actions: list[Action] = []
    created = 0
    measured = deployment.spec.autoscaling.mode == "Auto" and bool(pods.ready)
    rolled = progress(deployment, pods, decision.desired, now)
    waits = [decision.wait_seconds, MEASURE_SECONDS if measured else None, rolled.wait_seconds]
    if not deployment.spec.paused:
        stopped = rolled.current if rolled.stopped else ""
        was = history.former(deployment, known, stopped, defaults)
        if was is not None:
            step = standstill(pods, decision.desired, snapshot, now, rolled.current)
        else:
            room = Room(rolled.stopped, rolled.since, devices.places(snapshot, pods))
            step = moves(pods, decision.desired, snapshot, now, room)
        drained = list(finish(snapshot, pods, now))
        removals = list(leave(deployment, step.removals, now))
        given = devices.assigned(snapshot, pods, fit, step, now)
        waits.append(devices.next_choice_wait(snapshot, pods, now))
        # Never under the ServiceAccount of somebody else.
        safe = "ServiceAccount" not in taken
        adding = list(_adding(deployment, pods, step.why_add, step.additions, given.places, used))
        if was is not None:
            adding += _restoring(snapshot, pods, step, was, now)
        adding = adding if safe else []
        in_use = {pod.revision for pod in snapshot.pods} | {rolled.current}
        recording = history.record(deployment, revision, known, in_use)
        created = len(adding)
        repairs = upkeep(snapshot, wanted, names(deployment))
        leaving = {removal.pod.uid for removal in step.removals}
        marks = [m for m in protections(snapshot, pods) if m.body["metadata"]["uid"] not in leaving]
        warm = list(balloons(snapshot, revision.name, fit, used, now)) if safe else []
        acts = [*drained, *removals, *given.deletes, *recording, *adding, *warm, *marks, *repairs]
        actions = _ordered(acts)
        draining = bool(pods.draining) or any(isinstance(a, Drain) for a in actions)
        waits += [step.wait_seconds, DRAIN_POLL_SECONDS if draining else None]
    waits.append(CONFLICT_RETRY_SECONDS if taken else None)
    short = shortage(snapshot, pods, decision.desired, fit, created, now)
    waits.append(short.wait_seconds if short is not None else None)
    default = desired.image(deployment, defaults)
    facts = Facts(
        snapshot,
        now,
        pods,
        decision.desired,
        decision.recommended,
        fit,
        rolled,
        "; ".join(taken.values()),
        default if default != desired.image(deployment, used) else "",
        short,
    )
    report = _report(facts, decision)
    new = status.build(report, deployment.status, now)
    waits.append(status.wait(report, deployment.status, now))
    changed = new if new != deployment.status else None
    events = tuple(transitions(deployment.status, new)) if changed is not None else ()
    ahead = [wait for wait in waits if wait is not None]
    due = min(ahead, default=None)
    return Plan(tuple(actions), changed, due, events, decision.code, report.telemetry)


def invalid(obj: Mapping[str, Any], problems: Sequence[str], now: float) -> Plan:
    """Plan of an object that parse() refused: only its status says so."""
    previous = obj.get("status") or {}
    generation = int((obj.get("metadata") or {}).get("generation") or 0)
    new = status.invalid(generation, unknown(problems), previous, now)
    if new == previous:
        return Plan()
    return Plan(status=new, events=(("Warning", "SpecInvalid", "; ".join(problems)),))


def _decide(snapshot: Snapshot, pods: Fleet, now: float) -> Decision:
    """The wanted number of replicas: the user's in mode Manual or paused, else the load's."""
    deployment = snapshot.deployment
    scaling, before = deployment.spec.autoscaling, deployment.status.get("desiredReplicas")
    manual = scaling.mode == "Manual"
    current = int(before) if before is not None else len(pods.active)
    policy = Policy(
        current=deployment.spec.replicas if manual else current,
        minimum=deployment.spec.replicas if manual else scaling.min_replicas,
        maximum=deployment.spec.replicas if manual else scaling.max_replicas,
        target=float(scaling.target_utilization),
        ready=tuple(sorted(pod.uid for pod in pods.ready)),
        up_percent=scaling.scale_up.max_step_percent,
        up_pods=scaling.scale_up.max_step_pods,
        down_window=seconds(scaling.scale_down.window),
        down_percent=scaling.scale_down.step_percent,
        down_interval=seconds(scaling.scale_down.interval),
        last_shrink=status.last_shrink(deployment.status),
        stored_capacity=(deployment.status.get("capacity") or {}).get("tokensPerSecondPerReplica"),
        stale_seconds=STALE_SECONDS + (CALM_POLL_SECONDS if manual else 0.0),
    )
    decision = decide(snapshot.history, policy, now)
    if manual:
        why = f"spec.replicas is {deployment.spec.replicas}"
        return replace(decision, reason=why, code="Manual", wait_seconds=None)
    if deployment.spec.paused:
        why = "spec.paused is true"
        return replace(decision, desired=current, reason=why, code="Paused", wait_seconds=None)
    return decision


def _adding(
    deployment: InferenceDeployment,
    pods: Fleet,
    why: str,
    heirs: Sequence[Successor],
    places: Sequence[Placement | None],
    defaults: Defaults,
) -> Iterator[Apply]:
    """New pods in the lowest free slots. A name in use, even by a dying pod, is never reused."""
    slots = (
        slot
        for slot in itertools.count()
        if desired.pod_name(deployment, slot, pods.revision) not in pods.names
    )
    chain = itertools.chain(heirs, itertools.repeat(None))
    for heir, place, slot in zip(chain, places, slots, strict=False):
        body = desired.pod(deployment, slot, pods.revision, defaults, heir, place)
        yield Apply(body, why if heir is not None else "made anew for other devices")


def _restoring(
    snapshot: Snapshot, pods: Fleet, step: Moves, was: history.Former, now: float
) -> list[Apply]:
    """Pods of the former revision, placed by what it asked for."""
    if not step.restorations:
        return []
    before = replace(pods, new=(), revision=was.revision)
    view = replace(snapshot, deployment=was.deployment)
    given = devices.assigned(
        view, before, devices.judged(view, pods), Moves(additions=step.restorations), now
    )
    heirs = step.restorations
    return list(
        _adding(was.deployment, before, step.why_restore, heirs, given.places, was.defaults)
    )


def _ordered(actions: Sequence[Action]) -> list[Action]:
    """Drain, delete, create: a rollout without surge must free devices first.

    Pods come last: they need their ServiceAccount, and their NetworkPolicy from the first moment.
    """
    order = {Drain: 0, Delete: 1, Apply: 2}
    return sorted(actions, key=lambda action: (order[type(action)], action.kind == "Pod"))


def _report(facts: Facts, decision: Decision) -> status.Report:
    deployment, pods = facts.snapshot.deployment, facts.fleet
    ready = len(pods.ready)
    counts = {
        "replicas": len(pods.active),
        "readyReplicas": ready,
        "updatedReplicas": len(pods.updated),
        "pendingReplicas": len(pods.active) - ready,
        "drainingReplicas": len(pods.draining),
        "desiredReplicas": decision.desired,
    }
    telemetry = status.Telemetry(
        decision.utilization,
        decision.capacity_tokens_per_second,
        decision.capacity_source,
        decision.demand_tokens_per_second,
        decision.queue_tokens,
    )
    return status.Report(
        generation=deployment.generation,
        counts=counts,
        selector=desired.selector(deployment),
        revision=pods.revision,
        current_revision=facts.progress.current,
        rollout=facts.progress.mark,
        conditions=conditions(facts),
        telemetry=telemetry,
        accelerator=devices.report(facts.fit, pods),
        decision_reason=decision.reason,
        decision_inputs=decision.inputs,
    )
