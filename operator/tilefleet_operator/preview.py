"""``tilefleet plan``: the operator's decisions about files, replayed without a cluster.

Uses the very plan() of production through simulate(). It reads files and returns text.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from tilefleet_operator.api import KIND, InferenceDeployment, parse
from tilefleet_operator.desired import Defaults
from tilefleet_operator.errors import ConfigInvalid
from tilefleet_operator.observed import NodeView, Snapshot, node_view
from tilefleet_operator.plan import Action, Plan
from tilefleet_operator.simulation import World, trace

Json = dict[str, Any]
_STEP_LIMIT = 120


def preview(filenames: Sequence[str], defaults: Defaults, output: str) -> str:
    """What happens with every InferenceDeployment in the files; ``output`` is table or json.

    Raises ConfigInvalid for a file that cannot be read, and SpecInvalid with all problems of an
    object. Simulated seconds count a pod as ready 5 s after it was placed.
    """
    documents = [document for name in filenames for document in _load(name)]
    nodes = tuple(node_view(body) for body in documents if body.get("kind") == "Node")
    fleets = [parse(body) for body in documents if body.get("kind") == KIND]
    if not fleets:
        raise ConfigInvalid(f"no {KIND} in {', '.join(filenames)}; nothing to plan")
    shown = [_replay(fleet, nodes, defaults) for fleet in fleets]
    if output == "json":
        return json.dumps(shown, indent=2)
    return "\n\n".join(_table(one) for one in shown)


def _load(filename: str) -> list[Json]:
    try:
        if filename == "-":
            text = sys.stdin.read()
        else:
            with open(filename, encoding="utf-8") as file:
                text = file.read()
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigInvalid(f"{filename}: {error}") from error
    for document in documents:
        if not isinstance(document, dict):
            kind = type(document).__name__
            raise ConfigInvalid(f"{filename}: a document is a {kind}, not a Kubernetes object")
    return [item for document in documents for item in _items(document)]


def _items(document: Json) -> list[Json]:
    """The objects of a List, or the object itself."""
    return list(document["items"]) if document.get("kind") == "List" else [document]


def _replay(fleet: InferenceDeployment, nodes: tuple[NodeView, ...], defaults: Defaults) -> Json:
    world = World(Snapshot(deployment=fleet, nodes=nodes), 0.0)
    steps = trace(world, defaults, limit=_STEP_LIMIT)
    acting = [(moment.now, step) for moment, step in steps if step.actions]
    status = next((step.status for _, step in reversed(steps) if step.status is not None), {})
    return {
        "namespace": fleet.namespace,
        "name": fleet.name,
        "steps": [_step(now, step) for now, step in acting],
        "conditions": list(status.get("conditions") or ()),
        "replicas": {field: status.get(field) for field in ("desiredReplicas", "readyReplicas")},
    }


def _step(now: float, step: Plan) -> Json:
    return {"seconds": now, "actions": [_action(action) for action in step.actions]}


def _action(action: Action) -> Json:
    shown = {
        "action": type(action).__name__,
        "kind": action.kind,
        "namespace": action.namespace,
        "name": action.name,
        "why": action.why,
    }
    body = asdict(action).get("body")
    return shown if body is None else {**shown, "body": body}


def _table(shown: Mapping[str, Any]) -> str:
    rows = [("SECOND", "ACTION", "OBJECT", "WHY")]
    rows += [
        (f"{step['seconds']:g}", one["action"], f"{one['kind']}/{one['name']}", one["why"])
        for step in shown["steps"]
        for one in step["actions"]
    ]
    conditions = [("CONDITION", "STATUS", "REASON", "MESSAGE")]
    conditions += [
        (one["type"], one["status"], one["reason"], one.get("message", ""))
        for one in shown["conditions"]
    ]
    replicas = shown["replicas"]
    title = (
        f"{shown['namespace']}/{shown['name']}: {replicas['desiredReplicas']} wanted,"
        f" {replicas['readyReplicas']} ready at the end"
    )
    return "\n".join([title, *_columns(rows), "", *_columns(conditions)])


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    """Rows with every column but the last as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]]).rstrip()
