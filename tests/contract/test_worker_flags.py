"""The halves share no code: what the operator renders, the worker must parse and mean the same."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tilefleet_operator import api, desired
from tilefleet_worker.config import ServeConfig, parse_args
from tilefleet_worker.server.admin import create_admin
from tilefleet_worker.sources import HubSource, LocalSource, parse_source

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.yaml"))
DEFAULTS = desired.Defaults("rocm:1", "cpu:1", "http://hub.internal:8080")


def deployment(uri="file:///models/tiny", vendor="cpu", **spec):
    """An InferenceDeployment as the API server would hand it out."""
    base = {"model": {"uri": uri}, "accelerator": {"vendor": vendor}}
    metadata = {"name": "chat", "namespace": "default", "uid": "u-1", "generation": 1}
    head = {"apiVersion": "tilefleet.io/v1alpha1", "kind": "InferenceDeployment"}
    return api.parse(head | {"metadata": metadata, "spec": base | spec})


def container(parsed):
    return desired.pod(parsed, 0, "abcd1234", DEFAULTS)["spec"]["containers"][0]


def worker_config(parsed) -> ServeConfig:
    args = container(parsed)["args"]
    assert args[0] == "serve"
    return parse_args(args[1:])


def test_defaults_of_both_halves_agree():
    config = worker_config(deployment())
    assert config == ServeConfig(
        model="file:///models/tiny",
        served_model_name="chat",
        backend="cpu",
        threads=config.threads,
    )
    assert config.threads >= 1


def test_every_rendered_value_arrives():
    config = worker_config(
        deployment(
            model={"uri": "hf://acme/tiny@v1", "name": "acme/tiny", "maxModelLen": 1024},
            engine={
                "kvCache": {"memory": "512Mi", "blockSize": 32, "prefixCaching": False},
                "maxBatchTokens": 512,
                "maxConcurrent": 7,
                "resources": {"cpu": "1500m", "memory": "3Gi"},
                "args": ["--dtype", "float32"],
            },
            rollout={"drain": {"timeout": "1m30s"}},
        )
    )
    assert config.model == "hf://acme/tiny@v1"
    assert config.hf_endpoint == DEFAULTS.hf_endpoint
    assert (config.served_model_name, config.max_model_len) == ("acme/tiny", 1024)
    assert (config.kv_cache_memory, config.block_size) == (512 * 2**20, 32)
    assert config.prefix_caching is False
    assert (config.max_batch_tokens, config.max_concurrent, config.threads) == (512, 7, 2)
    assert (config.drain_timeout, config.dtype) == (90.0, "float32")


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("file:///models/tiny", LocalSource(Path("/models/tiny"))),
        ("pvc://claim/a/b", LocalSource(Path("/models/a/b"))),
        ("hf://acme/tiny", HubSource("acme/tiny")),
        ("hf://acme/tiny@v1", HubSource("acme/tiny", "v1")),
    ],
)
def test_model_uris_mean_the_same_on_both_sides(uri, source):
    parsed = deployment(uri)
    assert parse_source(worker_config(parsed).model) == source
    mounts = {mount["mountPath"] for mount in container(parsed)["volumeMounts"]}
    assert ("/models" in mounts) == uri.startswith("pvc://")
    assert worker_config(parsed).cache_dir in mounts


@pytest.mark.parametrize("size", ["1", "1k", "2M", "1.5G", "1T", "64Ki", "256Mi", "2Gi", "1Ti"])
def test_every_size_the_api_admits_parses(size):
    spec = {"engine": {"kvCache": {"memory": size, "hostOffload": size}}}
    config = worker_config(deployment(**spec))
    assert config.kv_cache_memory == config.kv_offloading_size >= 1


@pytest.mark.parametrize("timeout", ["0s", "250ms", "90s", "5m", "1h", "1h30m10s"])
def test_every_duration_the_api_admits_parses(timeout):
    spec = {"rollout": {"drain": {"timeout": timeout}}}
    parsed = deployment(**spec)
    config = worker_config(parsed)
    grace = desired.pod(parsed, 0, "r", DEFAULTS)["spec"]["terminationGracePeriodSeconds"]
    # Strictly more than the worker's own sequence, or the kubelet kills it in the middle.
    assert grace > config.removal_delay + config.drain_timeout + 15


NUMBERS = {
    ("maxBatchTokens",): api.EngineSpec.model_fields["max_batch_tokens"],
    ("maxConcurrent",): api.EngineSpec.model_fields["max_concurrent"],
    ("kvCache", "blockSize"): api.KvCache.model_fields["block_size"],
}


def bounds(field):
    return [
        getattr(rule, name)
        for rule in field.metadata
        for name in ("ge", "le")
        if hasattr(rule, name)
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    list(itertools.chain.from_iterable([(p, b) for b in bounds(f)] for p, f in NUMBERS.items())),
)
def test_numbers_at_the_bounds_of_the_api_parse(path, value):
    spec = value
    for name in reversed(path):
        spec = {name: spec}
    worker_config(deployment(engine=spec))


def test_bounds_were_found():
    assert all(len(bounds(field)) == 2 for field in NUMBERS.values())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_start_a_worker(path):
    found = 0
    for document in yaml.safe_load_all(path.read_text()):
        if document and document["kind"] == "InferenceDeployment":
            document["metadata"] |= {"namespace": "default", "uid": "u", "generation": 1}
            assert worker_config(api.parse(document)).model
            found += 1
    assert found


def test_probes_ask_for_routes_that_exist():
    rendered = container(deployment())
    admin = create_admin(None, None, None)
    paths = {route.path for route in admin.routes}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = rendered[name]["httpGet"]
        assert get["path"] in paths
        assert get["port"] == "admin"
    ports = {port["name"]: port["containerPort"] for port in rendered["ports"]}
    config = worker_config(deployment())
    assert ports == {"http": config.port, "admin": config.admin_port}


@pytest.mark.parametrize(
    ("module", "foreign"),
    [
        ("tilefleet_operator.__main__", ["torch", "tilefleet_worker"]),
        ("tilefleet_worker.__main__", ["kopf", "kubernetes", "tilefleet_operator", "torch"]),
        ("tilefleet_worker.server.serve", ["kopf", "tilefleet_operator", "torch", "transformers"]),
    ],
)
def test_a_fresh_process_loads_only_its_half(module, foreign):
    code = f"import sys, {module}; print([m for m in {foreign} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
