"""The OpenAPI document names every route and takes every body that the worker takes."""

import json

import httpx
import jsonschema
import pytest

from tilefleet_worker.config import parse_args
from tilefleet_worker.server.answers import AnswerDesk
from tilefleet_worker.server.api import Api
from tilefleet_worker.server.app import routes
from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.model_api import ModelApi
from tilefleet_worker.server.openapi import OPERATIONS, document
from tilefleet_worker.server.state import WorkerState

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": None}}}


def valid(name, body):
    found = document("tiny", "1", with_keys=False)
    schema = {"$ref": f"#/components/schemas/{name}", "components": found["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(body)


def test_every_route_is_described_and_no_other():
    state = WorkerState(parse_args(["--model", "tiny"]))
    table = routes(Api(state, AnswerDesk(Metrics(state))), ModelApi(state))
    real = {(r.path.replace("{id:path}", "{id}"), m.lower()) for r in table for m in r.methods}
    described = {(path, operation.method) for path, operation in OPERATIONS.items()}
    assert {(path, method) for path, method in real if method != "head"} == described


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("ChatRequest", CHAT, True),
        ("ChatRequest", CHAT | {"temperature": None, "stop": None, "tools": [TOOL]}, True),
        ("ChatRequest", CHAT | {"model": "other"}, False),
        ("ChatRequest", CHAT | {"model": None}, False),
        ("ChatRequest", CHAT | {"temperature": 3}, False),
        ("ChatRequest", CHAT | {"nonsense": 1}, False),
        ("ChatRequest", CHAT | {"tools": [{"type": "function"}]}, False),
        ("CompletionRequest", {"model": "tiny", "prompt": "a" * 300}, True),
        ("CompletionRequest", {"model": "tiny", "prompt": [1] * 300}, True),
        ("CompletionRequest", {"model": "tiny", "prompt": ["a", "b"], "stop": "x"}, True),
        ("CompletionRequest", {"model": "tiny", "prompt": [[1], [2]], "stop": ["x"]}, True),
        ("CompletionRequest", {"model": "tiny", "prompt": ["a"] * 65}, False),
        ("CompletionRequest", {"model": "tiny", "prompt": [[]]}, False),
        (
            "CompletionRequest",
            {"model": "tiny", "prompt": "a", "repetition_penalty": 5e-324},
            False,
        ),
        ("CompletionRequest", {"model": "tiny", "prompt": "a", "logit_bias": {"1": None}}, False),
        ("ResponseRequest", {"model": "tiny", "input": "a"}, True),
        ("TokenizeRequest", {"prompt": "a", "model": None}, True),
        ("DetokenizeRequest", {"tokens": [1], "model": "tiny"}, True),
    ],
)
def test_the_document_and_the_worker_agree(worker, name, body, expected):
    assert valid(name, body) == expected
    path = {operation.body.__name__: p for p, operation in OPERATIONS.items() if operation.body}
    body = body | ({"max_tokens": 1} if name in ("ChatRequest", "CompletionRequest") else {})
    if "tools" in body:
        body["tool_choice"] = "none"
    reply = httpx.post(worker.api + path[name], json=body, timeout=60)
    assert (reply.status_code == 200) == expected, reply.text


def test_it_is_served_with_the_models_name_and_its_keys(worker):
    served = httpx.get(worker.api + "/openapi.json").json()
    assert served["openapi"] == "3.1.0"
    assert served["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["tiny"]
    assert "securitySchemes" not in served["components"]
    locked = document("tiny", "1", with_keys=True)
    unlocked = [p for p, item in locked["paths"].items() if "security" not in str(item)]
    assert unlocked == ["/health"]
    assert json.dumps(locked)
