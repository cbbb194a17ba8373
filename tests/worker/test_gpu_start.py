"""How a GPU engine sizes its pool and refuses what it cannot serve: no GPU."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilefleet_worker import gpu_device
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.factory import build_engine
from tilefleet_worker.gpu_engine import MARGIN_BYTES, pool_bytes, prompt_step_tokens
from tilefleet_worker.model_shapes import named_config

GIB = 2**30
MODEL = Path(__file__).parents[2] / "examples" / "tiny-model" / "model"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@given(total=st.integers(GIB, 300 * GIB), free_share=st.floats(0, 1), fraction=st.floats(0.01, 1))
def test_a_measured_pool_leaves_the_margin_and_the_others_share(
    total: int, free_share: float, fraction: float
) -> None:
    free = int(total * free_share)
    left = free - (1 - fraction) * total - MARGIN_BYTES
    if left < 1:
        with pytest.raises(ConfigError, match="--gpu-memory-fraction"):
            pool_bytes(0, fraction, free, total)
        return
    size = pool_bytes(0, fraction, free, total)
    assert 0 < size <= free - MARGIN_BYTES
    assert total - free + size + MARGIN_BYTES <= fraction * total + 1


def test_a_pool_that_is_asked_for_is_taken_as_it_is_or_refused() -> None:
    assert pool_bytes(5 * GIB, 0.1, 7 * GIB, 80 * GIB) == 5 * GIB
    with pytest.raises(ConfigError, match="--kv-cache-memory asks for 7"):
        pool_bytes(7 * GIB, 0.92, 15 * GIB // 2, 80 * GIB)


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("qwen3-0.6b", 8192),
        ("qwen3-30b-a3b", 4096),
        ("llama-3.1-8b", 2048),
        ("llama-3.1-70b", 2048),
    ],
)
def test_smaller_models_take_longer_steps_of_prompts(model: str, tokens: int) -> None:
    assert prompt_step_tokens(named_config(model)) == tokens


@no_gpu
def test_backend_triton_without_a_gpu_names_the_flag_and_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"--backend triton needs .*--backend cpu"):
        build_engine(MODEL, EngineConfig(backend="triton"))


def test_backend_triton_without_triton_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_device, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package triton, which is not installed"):
        gpu_device.require()
