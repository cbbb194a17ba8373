"""curl, as documentation shows it: a reply, a stream as it comes, a status for scripts."""

import json
import shutil
import subprocess

import pytest

CURL = shutil.which("curl")
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}

pytestmark = pytest.mark.skipif(CURL is None, reason="curl is not installed")


def curl(*arguments: str) -> str:
    command = [str(CURL), "--silent", "--show-error", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout


def post(url: str, body: dict, *more: str) -> str:
    return curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(body), *more)


def test_a_reply_is_json(worker):
    reply = json.loads(post(worker.api + "/v1/chat/completions", BODY))
    assert reply["usage"]["completion_tokens"] == 8
    assert json.loads(curl(worker.api + "/v1/models"))["data"][0]["id"] == "tiny"


def test_a_stream_comes_in_events_with_nothing_else(worker):
    text = post(worker.api + "/v1/chat/completions", BODY | {"stream": True}, "--no-buffer")
    events = text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_form_and_a_chunked_body_are_taken_as_json(worker):
    """`curl -d` alone names the type of a form; a pipe sends chunks."""
    url = worker.api + "/v1/completions"
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1})
    assert json.loads(curl(url, "-d", body))["usage"]["completion_tokens"] == 1
    chunked = curl(url, "-H", "Transfer-Encoding: chunked", "-d", body)
    assert json.loads(chunked)["usage"]["completion_tokens"] == 1


def test_scripts_see_the_status_and_when_to_come_back(worker):
    bad = post(
        worker.api + "/v1/completions", {"model": "no"}, "-o", "/dev/null", "-w", "%{http_code}"
    )
    assert bad == "400"
    head = curl(worker.api + "/health", "--head")
    assert head.startswith("HTTP/1.1 200")
