"""The CustomResourceDefinition, generated from the API models.

`python -m tilefleet_operator crd` prints it; crds/ holds the same text, kept equal by a test. The
converter turns pydantic's JSON schema into a structural schema: references inlined, noise dropped,
a default for every optional field, so that nested defaults apply and CEL never meets a missing
field. The CEL rules are in rules.py, the status in status_schema.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import yaml

from tilefleet_operator.api import (
    CATEGORY,
    GROUP,
    KIND,
    PLURAL,
    SHORT_NAME,
    SINGULAR,
    VERSION,
    Spec,
)
from tilefleet_operator.errors import OperatorError
from tilefleet_operator.rules import ROOT_RULES, RULES
from tilefleet_operator.status_schema import status_schema

_NOISE = {"title", "examples", "discriminator", "deprecated", "prefixItems", "uniqueItems"}


class _Dumper(yaml.SafeDumper):
    """Writes equal parts out in full, because not every reader of CRDs knows YAML aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition object. A fresh dictionary each time."""
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": SINGULAR,
        "shortNames": [SHORT_NAME],
        "categories": [CATEGORY],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": _columns(),
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "schema": {"openAPIV3Schema": _root()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def render() -> str:
    """The CRD as YAML, as crds/ holds it."""
    return yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def _columns() -> list[dict[str, Any]]:
    def column(name: str, kind: str, path: str, **more: int) -> dict[str, Any]:
        return {"name": name, "type": kind, "jsonPath": path, **more}

    return [
        column("Model", "string", ".spec.model.uri", priority=1),
        column("Desired", "integer", ".status.desiredReplicas"),
        column("Ready", "integer", ".status.readyReplicas"),
        column("Tok/s", "integer", ".status.demand.tokensPerSecond"),
        column("Util", "string", ".status.utilization"),
        column("Status", "string", '.status.conditions[?(@.type=="Ready")].reason'),
        column("Age", "date", ".metadata.creationTimestamp"),
    ]


def _root() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A fleet of replicas that serve one language model.",
        "required": ["spec"],
        "x-kubernetes-validations": ROOT_RULES,
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
            "kind": {"type": "string", "description": KIND},
            # The bound keeps the estimated cost of the rules on the name inside CEL's budget.
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 253}},
            },
            "spec": spec_schema(),
            "status": status_schema(),
        },
    }


def spec_schema() -> dict[str, Any]:
    """Structural schema of the spec, with defaults and CEL rules."""
    raw = Spec.model_json_schema(by_alias=True)
    schema = structural(raw, raw.get("$defs", {}))
    for path, rules in RULES.items():
        node = schema
        for part in path:
            node = node["properties"][part]
        node["x-kubernetes-validations"] = rules
    return schema


def structural(
    node: Mapping[str, Any], definitions: Mapping[str, Any], parents: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Structural form of one JSON schema node.

    Raises OperatorError on recursion and on unions, which Kubernetes cannot express.
    """
    if "$ref" in node:
        name = str(node["$ref"]).rpartition("/")[2]
        if name in parents:
            raise OperatorError(f"{name} contains itself; a structural schema cannot recurse")
        inlined = structural(definitions[name], definitions, (*parents, name))
        return {**inlined, **{k: v for k, v in node.items() if k != "$ref"}}
    if "anyOf" in node or "oneOf" in node or "allOf" in node:
        raise OperatorError(f"{node} is a union; use optional fields and a CEL rule")
    result = {k: v for k, v in node.items() if k not in _NOISE | {"$defs", "additionalProperties"}}
    if "properties" in node:
        required = set(node.get("required", ()))
        result["properties"] = {
            name: _with_default(
                structural(child, definitions, parents), optional=name not in required
            )
            for name, child in node["properties"].items()
        }
    elif isinstance(node.get("additionalProperties"), Mapping):
        result["additionalProperties"] = structural(
            node["additionalProperties"], definitions, parents
        )
    if "items" in node:
        result["items"] = structural(node["items"], definitions, parents)
    return result


def _with_default(schema: dict[str, Any], *, optional: bool) -> dict[str, Any]:
    """The schema with the default that a pydantic factory hides from its JSON schema.

    An object's default names all of its fields: the API server checks CEL rules against the default
    itself, before it would fill in what is missing.
    """
    if optional and "default" not in schema:
        if schema["type"] == "array":
            schema["default"] = []
        elif schema["type"] == "object":
            fields = schema.get("properties", {})
            known = {name: child["default"] for name, child in fields.items() if "default" in child}
            schema["default"] = copy.deepcopy(known)
    return schema
