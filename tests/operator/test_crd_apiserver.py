"""The CRD on a real API server: it is accepted, defaults as the models do, and refuses well."""

from typing import Any

import pytest

from tests.operator.apiserver import FLEETS, ApiServer, Refused
from tests.operator.builders import document
from tests.operator.invalid_specs import objects
from tilefleet_operator import api
from tilefleet_operator.crd import crd

pytestmark = pytest.mark.apiserver

PATH = f"{FLEETS}/namespaces/default/inferencedeployments"
STRICT = "?fieldValidation=Strict"
# The API server names the type that it found, not the value.
SERVER_WORDS = {"replicas-type": ("spec.replicas", "string", "integer")}


def plain(obj: dict[str, Any]) -> dict[str, Any]:
    """The object as a user would write it."""
    return {**obj, "metadata": {"name": obj["metadata"]["name"], "namespace": "default"}}


@pytest.mark.parametrize(
    ("case", "obj", "words"), [pytest.param(*found, id=found[0]) for found in objects()]
)
def test_invalid_object_is_refused_with_field_value_and_rule(
    apiserver: ApiServer, case: str, obj: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(Refused) as caught:
        apiserver.create(PATH + STRICT + "&dryRun=All", plain(obj))
    assert caught.value.code in (400, 422)
    for word in SERVER_WORDS.get(case, words):
        assert word in caught.value.message


def test_scheme_of_the_model_is_immutable_and_the_rest_of_the_uri_is_not(
    apiserver: ApiServer,
) -> None:
    apiserver.create(PATH, plain(document("scheme")))
    where = f"{PATH}/scheme"
    apiserver.merge(where, {"spec": {"model": {"uri": "file:///models/other"}}})
    with pytest.raises(Refused, match="changes the scheme of file:///models/other"):
        apiserver.merge(where, {"spec": {"model": {"uri": "hf://a/b"}}})


def test_defaults_of_the_server_equal_those_of_the_models(apiserver: ApiServer) -> None:
    least = {**plain(document("least")), "spec": {"model": {"uri": "hf://a/b"}}}
    stored = apiserver.create(PATH + "?dryRun=All", least)
    spec = api.Spec.model_validate(least["spec"])
    assert stored["spec"] == spec.model_dump(by_alias=True)
    assert api.parse(stored).spec == spec


def test_every_rule_compiles_and_no_part_of_the_schema_is_dropped(apiserver: ApiServer) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    stored = apiserver.get(f"{path}/{crd()['metadata']['name']}")
    ours = crd()["spec"]["versions"][0]
    assert stored["spec"]["versions"][0]["schema"] == ours["schema"]
    assert all(c["status"] == "True" for c in stored["status"]["conditions"])


def test_scale_subresource_reads_and_writes_what_it_names(apiserver: ApiServer) -> None:
    apiserver.create(PATH, plain(document("scaled", replicas=2)))
    where = f"{PATH}/scaled"
    apiserver.merge(f"{where}/status", {"status": {"replicas": 2, "selector": "a=b"}})
    scale = apiserver.get(f"{where}/scale")
    assert scale["spec"]["replicas"] == 2
    assert scale["status"] == {"replicas": 2, "selector": "a=b"}
    apiserver.merge(f"{where}/scale", {"spec": {"replicas": 3}})
    assert apiserver.get(where)["spec"]["replicas"] == 3
