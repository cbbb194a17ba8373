"""A real Prometheus scrapes a worker and answers what dashboards and routers for vLLM ask."""

import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text

ROOT = Path(__file__).parents[3]
SERIES = yaml.safe_load((ROOT / "hack" / "vllm_series.yaml").read_text())
HERE = [entry for entry in SERIES if "missing" not in entry]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
TEXT = {"model": "tiny", "prompt": "p" * 40, "max_tokens": 8}
CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: workers
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def program(name: str) -> str:
    found = shutil.which(name) or CACHE / "tilefleet" / "prometheus" / "usr" / "bin" / name
    if not Path(found).exists():
        pytest.skip(f"{name} is missing: make system unpacks Debian's")
    return str(found)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Prometheus:
    """A server of its own, on the loopback."""

    def __init__(self, folder: Path, target: int) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        (folder / "prom.yml").write_text(CONFIG.format(port=target))
        self.log = (folder / "log").open("w+")
        command = [program("prometheus"), f"--config.file={folder / 'prom.yml'}"]
        command += [f"--storage.tsdb.path={folder}", f"--web.listen-address=127.0.0.1:{port}"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def get(self, path: str, **parameters: str) -> dict:
        try:
            return httpx.get(self.url + path, params=parameters, timeout=30).json()["data"]
        except (httpx.TransportError, ValueError):  # it has not started yet
            return {}

    def ask(self, query: str) -> list[float]:
        found = self.get("/api/v1/query", query=query).get("result", [])
        return [float(sample["value"][1]) for sample in found]

    def wait(self, query: str) -> None:
        end = time.monotonic() + 120
        while not any(value > 0 for value in self.ask(query)):
            assert self.process.poll() is None, Path(self.log.name).read_text()
            assert time.monotonic() < end, (query, self.get("/api/v1/targets"))
            time.sleep(0.2)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture
def prometheus(tmp_path: Path, worker) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path, worker.admin_port)
    yield server
    server.stop()


def query_of(entry: dict) -> str:
    name = entry["series"]
    usual = {
        "gauge": f"max by (instance) ({name})",
        "counter": f"sum by (instance) (rate({name}_total[1m]))",
        "histogram": f"histogram_quantile(0.9, sum by (le) (rate({name}_bucket[1m])))",
    }
    return str(entry.get("query", usual[entry["type"]]))


def test_every_series_that_tools_ask_for_has_an_answer(prometheus, worker):
    """Each as a dashboard asks: a gauge by itself, the rate of a counter, a quantile."""
    prometheus.wait("up")
    # A rate needs the value before the load and after it.
    prometheus.wait("vllm:request_success_total >= bool 0")
    for number in range(4):
        body = TEXT | {"n": 1 + number % 2}
        assert httpx.post(worker.api + "/v1/completions", json=body).status_code == 200
    prometheus.wait("sum(rate(vllm:e2e_request_latency_seconds_count[1m]))")
    answers = {query_of(entry): prometheus.ask(query_of(entry)) for entry in HERE}
    empty = [query for query, found in answers.items() if not any(map(math.isfinite, found))]
    assert empty == []


def test_what_the_list_calls_missing_is_missing(worker):
    names = {family.name for family in parse_text(httpx.get(worker.admin + "/metrics").text)}
    assert names.isdisjoint(entry["series"] for entry in SERIES if "missing" in entry)
    assert all(entry["missing"] for entry in SERIES if "missing" in entry)


def test_openmetrics_page_is_valid_and_says_the_same(worker):
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    reply = httpx.get(worker.admin + "/metrics", headers=accept)
    assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert reply.text.endswith("# EOF\n")
    text = httpx.get(worker.admin + "/metrics").text
    types = {family.name: family.type for family in parse_text(text)}
    assert {family.name: family.type for family in parse_open(reply.text)} == types


def test_promtool_complains_only_of_names_that_are_vllms(worker):
    page = httpx.get(worker.admin + "/metrics").text
    command = [program("promtool"), "check", "metrics"]
    run = subprocess.run(command, input=page, capture_output=True, text=True, timeout=60)
    complaints = [line for line in run.stderr.splitlines() if line]
    colons = "metric names should not contain ':'"
    named = "vllm:iteration_tokens_total non-counter metrics should not have"
    rest = [line for line in complaints if not line.endswith(colons) and named not in line]
    assert rest == []
    assert all(line.startswith("vllm:") for line in complaints)
