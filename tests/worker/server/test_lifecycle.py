"""Probes, drain and exit of a worker process."""

import json
import signal
import threading
import time

import httpx
import openai
import pytest

SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 1}
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True}


class Stream(threading.Thread):
    """Reads a stream to its end in the background."""

    def __init__(self, worker, **fields):
        super().__init__(daemon=True)
        self.url = worker.api + "/v1/completions"
        self.body = BODY | {"stream": True} | fields
        self.text = ""
        self.error = None
        self.status, self.headers = 0, {}
        self.first = threading.Event()
        self.start()

    def run(self):
        try:
            self.read()
        except httpx.HTTPError as error:  # a test may end its worker under this stream
            self.error = error

    def read(self):
        with httpx.stream("POST", self.url, json=self.body, timeout=60) as reply:
            self.status, self.headers = reply.status_code, reply.headers
            for chunk in reply.iter_text():
                self.text += chunk
                self.first.set()

    def events(self):
        self.join(60)
        assert not self.is_alive()
        assert self.error is None
        return self.text.strip().split("\n\n")


def status(url):
    return httpx.get(url).status_code


def test_probes_answer_while_the_model_loads(start_worker):
    worker = start_worker(load_seconds=3.0)
    assert worker.listening.wait(30), worker.log
    assert status(worker.admin + "/startupz") == 200
    assert status(worker.admin + "/livez") == 200
    assert status(worker.admin + "/metrics") == 200
    for _ in range(1500):  # the phases before the weights take as long as the machine lets them
        ready = httpx.get(worker.admin + "/readyz")
        assert ready.status_code == 503
        if ready.json()["reason"] == "starting: weights":
            break
        assert ready.json()["reason"] in {"starting: import", "starting: download"}
        time.sleep(0.02)
    else:
        pytest.fail(f"the weights never began to load: {ready.json()}")
    reply = httpx.post(worker.api + "/v1/completions", json=BODY)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert 1 <= int(reply.headers["retry-after"]) <= 120
    assert status(worker.api + "/health") == 503
    assert worker.stats()["ready"] is False
    worker.wait_ready()
    assert status(worker.api + "/health") == 200
    stats = worker.stats()
    assert stats["ready"] is True
    assert {p["phase"] for p in stats["startup"]} >= {"import", "download", "weights", "warmup"}
    assert stats["config"]["backend"] == "cpu"
    assert stats["config"]["max_model_len"] == 512


def test_sigterm_while_loading_exits_clean(start_worker):
    worker = start_worker(load_seconds=30.0)
    assert worker.listening.wait(30), worker.log
    began = time.monotonic()
    assert worker.end() == 0
    assert time.monotonic() - began < 5


def test_sigterm_lets_running_requests_finish(start_worker):
    worker = start_worker("--removal-delay", "3s", step_seconds=0.02).wait_ready()
    stream = Stream(worker)
    assert stream.first.wait(20)
    worker.process.send_signal(signal.SIGTERM)
    worker.wait(lambda: status(worker.admin + "/readyz") == 503, 5)
    assert worker.stats()["draining"] is True
    late = httpx.post(worker.api + "/v1/completions", json=SHORT)
    assert late.status_code == 200  # within the removal delay it still accepts
    worker.wait(
        lambda: httpx.post(worker.api + "/v1/completions", json=SHORT).status_code == 503, 9
    )
    refused = httpx.post(worker.api + "/v1/completions", json=BODY)
    assert refused.json()["error"]["code"] == "draining"
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert int(refused.headers["retry-after"]) >= 1
    events = stream.events()
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert worker.process.wait(30) == 0


def test_deadline_cuts_with_an_error_event(start_worker):
    worker = start_worker("--drain-timeout", "300ms", step_seconds=0.05).wait_ready()
    stream = Stream(worker)
    assert stream.first.wait(20)
    whole = {}

    def ask():
        reply = httpx.post(worker.api + "/v1/completions", json=BODY, timeout=60)
        whole.update(status=reply.status_code, code=reply.json()["error"]["code"])

    asker = threading.Thread(target=ask)
    asker.start()
    worker.wait(lambda: worker.stats()["gauges"]["running"] == 2, 20)
    assert worker.end() == 0
    events = stream.events()
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "draining"
    assert events[-1] == "data: [DONE]"
    asker.join(20)
    assert whole == {"status": 503, "code": "draining"}


def test_second_signal_cuts_at_once(start_worker):
    worker = start_worker(step_seconds=0.05).wait_ready()
    stream = Stream(worker)
    assert stream.first.wait(20)
    worker.process.send_signal(signal.SIGTERM)
    worker.wait(lambda: worker.stats()["draining"], 5)
    began = time.monotonic()
    assert worker.end(signal.SIGINT) == 0
    assert time.monotonic() - began < 10
    assert "draining" in stream.events()[-2]


def test_drain_request_counts_down_and_keeps_the_process(start_worker):
    worker = start_worker(step_seconds=0.01).wait_ready()
    stream = Stream(worker, max_tokens=100)
    assert stream.first.wait(20)
    reply = httpx.post(worker.admin + "/drain", json={"timeout_seconds": 60})
    assert (reply.status_code, reply.json()) == (202, {"draining": True, "inflight": 1})
    assert status(worker.admin + "/readyz") == 503
    assert status(worker.admin + "/livez") == 200
    assert stream.events()[-1] == "data: [DONE]"
    worker.wait_idle()
    assert worker.process.poll() is None
    assert httpx.post(worker.admin + "/drain").json()["inflight"] == 0
    assert worker.end() == 0


@pytest.mark.parametrize("body", [b"{", b'{"timeout_seconds": -1}', b'{"timeout": 1}', b"[]"])
def test_bad_drain_request_drains_nothing(worker, body):
    assert httpx.post(worker.admin + "/drain", content=body).status_code == 400
    assert status(worker.admin + "/readyz") == 200


def test_openai_retries_a_draining_worker(start_worker):
    """openai-python takes our 503 for retryable and raises InternalServerError in the end."""
    worker = start_worker("--removal-delay", "0s", step_seconds=0.05).wait_ready()
    Stream(worker).first.wait(20)
    httpx.post(worker.admin + "/drain", json={"timeout_seconds": 20})
    worker.wait(
        lambda: httpx.post(worker.api + "/v1/completions", json=SHORT).status_code == 503, 9
    )
    with (
        openai.OpenAI(base_url=worker.api + "/v1", api_key="k", max_retries=1) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(**SHORT)
    assert caught.value.code == "draining"


def test_full_queue_is_a_429_with_retry_after(start_worker):
    worker = start_worker("--max-concurrent", "1", step_seconds=0.05).wait_ready()
    prompts = {"prompt": ["x"] * 64, "max_tokens": 4}
    streams = [Stream(worker, **prompts) for _ in range(17)]
    worker.wait(lambda: any(stream.status == 429 for stream in streams), 30)
    refused = next(stream for stream in streams if stream.status == 429)
    error = json.loads("".join(refused.events()))["error"]
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    assert 1 <= int(refused.headers["retry-after"]) <= 120


@pytest.mark.parametrize(
    ("flags", "status_", "words"),
    [
        (["--model", "/nowhere"], 3, ["ModelError", "/nowhere", "does not exist"]),
        (["--model", "ftp://x/y"], 2, ["'ftp'", "hf://org/name"]),
        (["--max-model-len", "513"], 2, ["513", "512"]),
        (["--api-key-file", "/nowhere"], 2, ["--api-key-file", "/nowhere"]),
        (["--unknown", "1"], 2, ["--unknown"]),
        (["--port", "http"], 2, ["--port", "'http'"]),
    ],
)
def test_a_worker_that_cannot_serve_says_why(start_worker, flags, status_, words):
    worker = start_worker(*flags)
    assert worker.process.wait(30) == status_, worker.log
    worker.reader.join()
    assert all(word in worker.log for word in words), worker.log
    assert "Traceback" not in worker.log


def test_taken_port_is_named(start_worker):
    first = start_worker()
    assert first.listening.wait(30)
    second = start_worker("--port", str(first.api_port))
    assert second.process.wait(30) == 2
    second.reader.join()
    assert f"--port {first.api_port}" in second.log
