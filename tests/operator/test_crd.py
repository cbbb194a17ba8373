"""The CRD: equal to the models and to the file in crds/; bad specs are refused with good words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from tests.operator.builders import document
from tests.operator.invalid_specs import objects
from tilefleet_operator import api
from tilefleet_operator.crd import crd, render, spec_schema, structural
from tilefleet_operator.errors import OperatorError, SpecInvalid
from tilefleet_operator.rules import RULES

CRDS = Path(__file__).parents[2] / "crds"
GOLDEN = CRDS / "tilefleet.io_inferencedeployments.yaml"


def walk(schema: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every node of a structural schema with its path."""
    found: list[tuple[tuple[str, ...], Any]] = [(path, schema)]
    for name, child in schema.get("properties", {}).items():
        found += walk(child, (*path, name))
    for part in ("items", "additionalProperties"):
        if part in schema:
            found += walk(schema[part], (*path, part))
    return found


def defaulted(schema: dict[str, Any], value: Any) -> Any:
    """The API server's defaulting: missing properties get theirs, then those inside them."""
    if schema["type"] == "object" and "properties" in schema:
        result = dict(value)
        for name, child in schema["properties"].items():
            if name not in result and "default" in child:
                result[name] = child["default"]
            if name in result:
                result[name] = defaulted(child, result[name])
        return result
    return value


def test_checked_in_file_is_the_generated_text() -> None:
    assert GOLDEN.read_text() == render(), "run: python -m tilefleet_operator crd > " + GOLDEN.name


def test_no_other_file_claims_to_be_a_crd() -> None:
    assert [p.name for p in sorted(CRDS.glob("*.yaml"))] == [GOLDEN.name]


def test_yaml_round_trip_keeps_every_value() -> None:
    assert yaml.safe_load(render()) == crd()
    assert "&id" not in render()


def test_defaults_of_the_schema_equal_those_of_the_models() -> None:
    least = {"model": {"uri": "hf://a/b"}}
    ours = api.Spec.model_validate(least).model_dump(by_alias=True)
    assert defaulted(spec_schema(), least) == ours


def test_every_optional_field_has_a_default_and_every_field_a_description() -> None:
    for path, node in walk(spec_schema()):
        for name, child in node.get("properties", {}).items():
            where = ".".join((*path, name))
            assert "default" in child or name in node.get("required", ()), where
            assert child.get("description"), where


def test_schema_is_structural() -> None:
    forbidden = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "title", "const", "uniqueItems"}
    root = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path, node in walk(root):
        assert "type" in node, path
        assert not forbidden & node.keys(), path
        assert not ("properties" in node and "additionalProperties" in node), path


def test_everything_that_rules_read_is_bounded() -> None:
    schema = spec_schema()
    for rule_path in RULES:
        node = schema
        for part in rule_path:
            node = node["properties"][part]
        for path, child in walk(node):
            if child["type"] == "string" and "enum" not in child:
                assert "maxLength" in child, (rule_path, path)
            if child["type"] == "array":
                assert "maxItems" in child, (rule_path, path)


def test_status_has_no_defaults_and_keyed_conditions() -> None:
    root = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    status = root["properties"]["status"]
    assert all("default" not in node for _, node in walk(status))
    assert status["properties"]["conditions"]["x-kubernetes-list-map-keys"] == ["type"]


def test_names_columns_and_subresources() -> None:
    spec = crd()["spec"]
    assert spec["names"]["shortNames"] == ["infd"]
    assert spec["names"]["categories"] == ["tilefleet"]
    version = spec["versions"][0]
    columns = {c["name"]: c for c in version["additionalPrinterColumns"]}
    assert list(columns) == ["Model", "Desired", "Ready", "Tok/s", "Util", "Status", "Age"]
    assert columns["Model"]["priority"] == 1
    assert version["subresources"]["scale"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }


@pytest.mark.parametrize(
    ("obj", "words"), [pytest.param(obj, words, id=case) for case, obj, words in objects()]
)
def test_parse_refuses_with_field_value_and_rule(
    obj: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(SpecInvalid) as caught:
        api.parse(obj)
    for word in words:
        assert word in str(caught.value)


def test_parse_reports_every_problem_at_once() -> None:
    with pytest.raises(SpecInvalid) as caught:
        api.parse(document("7b", replicas=-1, speed=1))
    assert len(caught.value.problems) == 3


def test_parse_of_another_kind() -> None:
    with pytest.raises(SpecInvalid, match=r"is not tilefleet\.io/v1alpha1 InferenceDeployment"):
        api.parse(document() | {"kind": "Deployment"})


def test_recursion_and_unions_are_errors_not_silent_losses() -> None:
    class Tree(BaseModel):
        children: "list[Tree]" = []

    raw = Tree.model_json_schema()
    with pytest.raises(OperatorError, match="cannot recurse"):
        structural(raw, raw["$defs"])
    with pytest.raises(OperatorError, match="union"):
        structural({"anyOf": [{"type": "string"}, {"type": "integer"}]}, {})


def test_kubectl_explain_has_a_text_for_every_field() -> None:
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

    def silent(node: Mapping[str, Any], path: str) -> list[str]:
        found = []
        for name, child in node.get("properties", {}).items():
            here = f"{path}.{name}"
            if not child.get("description"):
                found.append(here)
            found += silent(child.get("items", child), here)
        return found

    assert [path for path in silent(schema, "") if not path.startswith(".metadata")] == []
