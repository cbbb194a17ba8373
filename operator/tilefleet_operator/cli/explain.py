"""``kubectl tilefleet explain``: why this many replicas, why Pending, why not this node.

Numbers are those of the object's status, so the same that the operator decided from; nodes are
judged anew by the operator's own rules.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

from tilefleet_operator import hardware, placement
from tilefleet_operator.autoscale import (
    BACKLOG_DRAIN_SECONDS,
    BACKLOG_TARGET,
    Policy,
    replicas_for,
)
from tilefleet_operator.cli import output
from tilefleet_operator.cli.connection import connect
from tilefleet_operator.cli.fleets import FleetView, Surroundings, fleet, surroundings
from tilefleet_operator.cli.status import as_json, state
from tilefleet_operator.errors import ConfigInvalid
from tilefleet_operator.units import timestamp


def add(commands: Any, flags: argparse.ArgumentParser) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "explain",
        parents=[flags],
        help="why this many replicas, why Pending, why not this node",
        description="The formula of the fleet's size with its numbers, the last decisions, what"
        " keeps each replica from serving, and for vendor amd the verdict on every AMD node.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the fleet")
    parser.add_argument("--node", metavar="NODE", help="only the verdict on this node")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text",
                        help="default: text")  # fmt: skip
    parser.set_defaults(run=run)


async def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    async with connect(arguments) as connection:
        view = await fleet(connection, arguments.name)
        amd = view.deployment.spec.accelerator.vendor == "amd"
        around = await surroundings(connection) if amd or arguments.node else Surroundings()
    nodes = verdicts(view, around, arguments.node)
    now = time.time()
    shown = {
        "namespace": view.deployment.namespace,
        "name": view.deployment.name,
        "size": size(view),
        "decisions": list(view.status.get("decisions") or ()),
        "replicas": _waiting(view, now),
        "nodes": nodes,
        "problem": around.problem,
    }
    if arguments.output == "json":
        print(output.dump(shown))
    elif arguments.node:
        print(output.lines(_node_table(nodes)))
    else:
        print(_text(shown, now))
    return 0


def size(view: FleetView) -> list[str]:
    """Why the fleet has this size, as lines from inputs to result."""
    spec, status = view.deployment.spec, view.status
    scaling = spec.autoscaling
    desired = status.get("desiredReplicas")
    if desired is None:
        return ["the operator has not reported yet"]
    if spec.paused:
        return [f"{desired} replicas wanted; spec.paused is true, so no pod is changed"]
    if scaling.mode != "Auto":
        return [f"{desired} replicas wanted: mode {scaling.mode}, spec.replicas {spec.replicas}"]
    title = f"{desired} replicas wanted: mode Auto, {scaling.min_replicas}..{scaling.max_replicas}"
    return [title, *_formula(view)]


def _formula(view: FleetView) -> list[str]:
    scaling, status = view.deployment.spec.autoscaling, view.status
    demand, capacity = status.get("demand") or {}, status.get("capacity") or {}
    arriving, queue = demand.get("tokensPerSecond"), float(demand.get("queueTokens") or 0)
    full = capacity.get("tokensPerSecondPerReplica")
    if arriving is None or not full:
        metrics = view.condition("MetricsAvailable")
        why = f"{metrics.get('reason', 'Unknown')}: {metrics.get('message', 'no report')}"
        return [f"demand or capacity is not known yet, so the size is held ({why})"]
    target = float(scaling.target_utilization)
    policy = Policy(0, scaling.min_replicas, scaling.max_replicas, target)
    forward = replicas_for(arriving, 0.0, full, policy)
    needed = replicas_for(arriving, queue, full, policy)
    lines = [
        f"demand     D = {arriving:g} tok/s: arrivals × tokens of a mean request",
        f"capacity   C = {full:g} tok/s of one full replica ({capacity.get('source')})",
        f"forward    ceil(D / (targetUtilization × C)) = ceil({arriving:g} / ({target:g} ×"
        f" {full:g})) = {forward}",
    ]
    if queue > 0:
        lines.append(
            f"backlog    ceil((D + Q / {BACKLOG_DRAIN_SECONDS:g} s) / ({BACKLOG_TARGET:g} C)) ="
            f" {replicas_for(arriving, queue, full, policy)}, Q = {queue:g} tokens wait"
        )
    limited = min(max(needed, scaling.min_replicas), scaling.max_replicas)
    lines.append(f"in limits  {limited}")
    desired = int(status["desiredReplicas"])
    if desired > limited:
        window, interval = scaling.scale_down.window, scaling.scale_down.interval
        lines.append(
            f"held at    {desired}: down only to the largest need of the last {window}, in steps"
            f" {interval} apart, and never while requests wait or a replica is silent"
        )
    elif desired < limited:
        lines.append(f"held at    {desired}: the next look follows within 2 s")
    return lines


def _waiting(view: FleetView, now: float) -> list[dict[str, Any]]:
    """The replicas that do not serve, as `status` shows them."""
    shown = as_json(view, now)["replicas"]
    return [one for one in shown if one["state"] != "ready"]


def verdicts(view: FleetView, around: Surroundings, only: str | None) -> list[dict[str, Any]]:
    """Every AMD node, or the one asked for: room, own replicas, and why not.

    Raises ConfigInvalid for a node that does not exist.
    """
    accelerator = view.deployment.spec.accelerator
    if only and only not in {node.name for node in around.nodes}:
        raise ConfigInvalid(around.problem or f"no node {only!r}; see: kubectl get nodes")
    result = []
    for node in sorted(around.nodes, key=lambda n: n.name):
        if node.name != (only or node.name) or not (only or hardware.is_candidate(node)):
            continue
        own = sum(1 for pod in view.pods if pod.node == node.name and state(pod) != "crashed")
        one: dict[str, Any] = {"node": node.name, "own": own, "free": None, "why": ""}
        if accelerator.vendor != "amd":
            one["why"] = "" if node.ready and node.schedulable else "not Ready or cordoned"
        elif not hardware.is_candidate(node):
            one["why"] = "no AMD device: neither a label of the labeller nor a device resource"
        else:
            one |= _judged(placement.fit(accelerator, [node], around.device_use))
        result.append(one)
    return result


def _judged(fit: placement.Fit) -> dict[str, Any]:
    """The verdict on the one node of a judgement: room for any of the options, or why not."""
    if fit.refused:
        return {"why": fit.refused[0][1]}
    offers = [(option, node) for option in fit.options for node in option.matching]
    room = next((node for option, node in offers if node.free >= option.count), None)
    if room is not None:
        return {"free": room.free, "why": ""}
    option, node = offers[0]
    short = f"{node.free} of {node.total} {option.resource} are free, a replica needs"
    return {"free": node.free, "why": f"{short} {option.count}"}


def _node_table(nodes: list[dict[str, Any]]) -> list[str]:
    rows = [("NODE", "OWN", "FREE", "VERDICT")]
    for one in nodes:
        free = "-" if one["free"] is None else str(one["free"])
        verdict = f"no: {one['why']}" if one["why"] else "room for a replica"
        rows.append((one["node"], str(one["own"]), free, verdict))
    return output.table(rows, {"room for a replica": "good"}) if len(rows) > 1 else []


def _text(shown: Mapping[str, Any], now: float) -> str:
    decisions = [("AGE", "FROM", "TO", "REASON", "INPUTS")]
    for one in reversed(shown["decisions"]):
        inputs = " ".join(f"{key}={value}" for key, value in (one.get("inputs") or {}).items())
        age = output.duration(now - timestamp(one["time"]))
        decisions.append((age, str(one["from"]), str(one["to"]), one["reason"], inputs))
    replicas = [("REPLICA", "STATE", "NODE", "WHY")]
    replicas += [(r["name"], r["state"], r["node"] or "-", r["why"]) for r in shown["replicas"]]
    return output.lines(
        [f"{shown['namespace']}/{shown['name']}: {shown['size'][0]}", *shown["size"][1:]],
        output.table(decisions) if len(decisions) > 1 else [],
        output.table(replicas) if len(replicas) > 1 else ["every replica serves"],
        [shown["problem"]] if shown["problem"] else _node_table(shown["nodes"]),
    )
