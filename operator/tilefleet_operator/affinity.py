"""Node affinity: the terms that find a choice of devices by label, and what they match.

A plan judges nodes, the scheduler places pods. matches() reads terms as the scheduler does, so that
a plan can see where the two would differ, and name the nodes. Does not know what a node offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tilefleet_operator.hardware import BETA_DEVICE_ID_KEY, DEVICE_ID_KEY, NodeView
from tilefleet_operator.partitions import PARTITION_KEYS

HOSTNAME_KEY = "kubernetes.io/hostname"
_COMPUTE_MODES = ("spx", "dpx", "tpx", "qpx", "cpx")
_MEMORY_MODES = ("nps1", "nps2", "nps4", "nps8")

Term = dict[str, Any]
Expression = dict[str, Any]


def label_terms(ids: Sequence[str], partition: str) -> list[Term]:
    """ORed terms for PCI device ids (empty: any) and a partition; none when every node will do.

    partition: "" any, "whole" no partitions, else a pattern such as "cpx_" or "spx_nps1" or
    "_nps4". Models: the value form, and the beta count form of older labellers. Nodes that mix
    models are told apart by name. Never NotIn: for a label that its pool does not define, Karpenter
    would invent a value that is not excluded, and write it on the node.
    """
    return [
        {"matchExpressions": [*models, *modes]}
        for modes in _partition_alternatives(partition)
        for models in _model_alternatives(ids)
        if models or modes
    ]


def _model_alternatives(ids: Sequence[str]) -> list[list[Expression]]:
    if not ids:
        return [[]]
    count_forms = [{"key": f"{BETA_DEVICE_ID_KEY}.{i}", "operator": "Exists"} for i in ids]
    return [
        [_values(DEVICE_ID_KEY, "In", ids)],
        *([form, _absent(DEVICE_ID_KEY)] for form in count_forms),
    ]


def _partition_alternatives(partition: str) -> list[list[Expression]]:
    if not partition:
        return [[]]
    pattern = "spx_" if partition == "whole" else partition
    modes = [f"{c}_{m}" for c in _COMPUTE_MODES for m in _MEMORY_MODES]
    wanted = [mode for mode in modes if pattern in mode]
    first, second = PARTITION_KEYS
    found = [
        [_values(first, "In", wanted)],
        [_values(second, "In", wanted), _absent(first)],
    ]
    # GPUs that cannot be partitioned, and labellers without these labels.
    unlabelled = [[_absent(first), _absent(second)]] if partition == "whole" else []
    return [*found, *unlabelled]


def narrowed(terms: Sequence[Term], excluded: Iterable[NodeView]) -> list[Term]:
    """The terms without the excluded nodes; none when every node will do."""
    nodes = sorted(excluded, key=lambda node: node.name)
    hosts = [node.labels[HOSTNAME_KEY] for node in nodes if node.labels.get(HOSTNAME_KEY)]
    more = [_values(HOSTNAME_KEY, "NotIn", hosts)] if hosts else []
    # The field takes one value. It stands in only for the label, which node autoscalers read.
    fields = [
        _values("metadata.name", "NotIn", [node.name])
        for node in nodes
        if not node.labels.get(HOSTNAME_KEY)
    ]
    if not more and not fields:
        return list(terms)
    result: list[Term] = []
    for term in terms or [{"matchExpressions": []}]:
        narrow: Term = {"matchExpressions": [*term["matchExpressions"], *more]}
        result.append({**narrow, "matchFields": fields} if fields else narrow)
    return result


def named(nodes: Iterable[NodeView]) -> list[Term]:
    """The term that finds nodes by name; empty without any. They must have the hostname label."""
    hosts = sorted(node.labels[HOSTNAME_KEY] for node in nodes)
    return [{"matchExpressions": [_values(HOSTNAME_KEY, "In", hosts)]}] if hosts else []


def matches(terms: Sequence[Term], node: NodeView) -> bool:
    """Whether the scheduler lets a pod with these required terms on a node; none: any node."""
    return not terms or any(
        all(_holds(e, node.labels) for e in term.get("matchExpressions", ()))
        and all(_holds(e, {"metadata.name": node.name}) for e in term.get("matchFields", ()))
        for term in terms
    )


def _holds(expression: Expression, labels: Mapping[str, str]) -> bool:
    value = labels.get(expression["key"])
    operator: str = expression["operator"]
    values: Sequence[str] = expression.get("values", ())
    if operator == "In":
        return value in values
    if operator == "NotIn":
        return value not in values
    return (value is not None) == (operator == "Exists")


def _values(key: str, operator: str, values: Sequence[str]) -> Expression:
    return {"key": key, "operator": operator, "values": list(values)}


def _absent(key: str) -> Expression:
    return {"key": key, "operator": "DoesNotExist"}
