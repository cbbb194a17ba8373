"""Requests and options: bad values name the field, the value and the rule."""

import dataclasses

import pytest

from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import ConfigError, RequestError
from tilefleet_worker.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2**63),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_tokens", 9),
        ("seed", 2**63),
    ],
)
def test_bad_sampling_params_answer_400_and_name_the_field(param: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{"max_tokens": 8, param: value})  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.param) == (400, param)
    assert str(value) in caught.value.message


def test_the_seed_is_the_callers_or_follows_from_the_id() -> None:
    def seed(name: str, given: int | None) -> int:
        return Request(name, [1], SamplingParams(max_tokens=1, seed=given), 0.0).sampling_seed()

    assert seed("a", 5) == seed("b", 5) == 5
    assert seed("a", -1) == 2**64 - 1
    assert seed("a", None) == seed("a", None) != seed("b", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "tpu"),
        ("dtype", "int4"),
        ("block_size", -1),
        ("kv_cache_bytes", -1),
        ("max_batch_tokens", 0),
        ("max_concurrent", 0),
        ("max_waiting", -1),
        ("max_model_len", -1),
        ("threads", -1),
        ("stall_seconds", 0.0),
        ("gpu_memory_fraction", 0.0),
        ("gpu_memory_fraction", 1.01),
    ],
)
def test_bad_options_name_themselves(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


def test_resolving_leaves_no_auto() -> None:
    resolved = EngineConfig().resolve(model_max_len=2048)
    assert "auto" not in dataclasses.asdict(resolved).values()
    assert resolved.max_model_len == 2048
    assert EngineConfig(max_model_len=100).resolve(model_max_len=2048).max_model_len == 100


def test_a_gpu_changes_what_auto_means_and_no_explicit_option() -> None:
    resolved = EngineConfig().resolve(model_max_len=2048, gpu=True)
    assert (resolved.backend, resolved.dtype, resolved.block_size) == ("triton", "bfloat16", 64)
    assert resolved.kv_cache_bytes == 0  # measured once the weights are there
    given = EngineConfig(backend="cpu", block_size=32, kv_cache_bytes=1 << 20)
    assert given.resolve(model_max_len=2048, gpu=True) == dataclasses.replace(
        given, dtype="float32", max_model_len=2048
    )
    wanted = EngineConfig(dtype="float16", block_size=16).resolve(model_max_len=2048, gpu=True)
    assert (wanted.dtype, wanted.block_size) == ("float16", 16)


def test_a_dtype_that_the_cpu_does_not_compute_in_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype is 'bfloat16', but backend 'cpu'"):
        EngineConfig(dtype="bfloat16").resolve(model_max_len=2048)


def test_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len is 4096, but the model supports 2048"):
        EngineConfig(max_model_len=4096).resolve(model_max_len=2048)
