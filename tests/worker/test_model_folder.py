"""Model folders: what is damaged or unsupported is refused with file, tensor and both shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tilefleet_worker import models
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import ConfigError, ModelError
from tilefleet_worker.factory import build_engine
from tilefleet_worker.kv_cache import block_bytes
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.weights import Weights

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def tensors() -> dict[str, torch.Tensor]:
    made = {
        "model.embed_tokens.weight": torch.randn(64, 16),
        "model.norm.weight": torch.ones(16),
    }
    for index in range(2):
        prefix = f"model.layers.{index}"
        for name, shape in (
            ("input_layernorm", (16,)),
            ("post_attention_layernorm", (16,)),
            ("self_attn.q_proj", (16, 16)),
            ("self_attn.k_proj", (8, 16)),
            ("self_attn.v_proj", (8, 16)),
            ("self_attn.o_proj", (16, 16)),
            ("self_attn.q_norm", (8,)),
            ("self_attn.k_norm", (8,)),
            ("mlp.gate_proj", (24, 16)),
            ("mlp.up_proj", (24, 16)),
            ("mlp.down_proj", (16, 24)),
        ):
            made[f"{prefix}.{name}.weight"] = torch.randn(shape)
    return made


def write(
    folder: Path,
    config: dict[str, Any] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(weights or tensors(), folder / "model.safetensors")
    return folder


def load(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    with Weights(folder) as weights:
        models.load(config, weights, config.max_positions)


def test_a_whole_folder_loads_and_reports_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = ModelConfig.from_folder(write(tmp_path))
    with Weights(tmp_path, lambda done, total: seen.append((done, total))) as weights:
        models.load(config, weights, 128)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == sum(tensor.numel() * 4 for tensor in tensors().values())
    assert seen[-1][0] <= seen[-1][1]


@pytest.mark.parametrize("keep", [0, 5, 700, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: is not a whole safetensors file"):
        load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: is missing"):
        load(tmp_path)


def test_a_missing_tensor_is_named_with_its_shape(tmp_path: Path) -> None:
    weights = tensors()
    del weights["model.layers.1.mlp.up_proj.weight"]
    write(tmp_path, weights=weights)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight is missing.*\[24, 16\]"):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    write(tmp_path, weights=tensors() | {"model.norm.weight": torch.ones(17)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[17\], expected \[16\]"):
        load(tmp_path)


def test_a_tensor_of_another_type_is_refused(tmp_path: Path) -> None:
    write(tmp_path, weights=tensors() | {"model.norm.weight": torch.ones(16, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"has type torch\.int8, expected one of torch\.float32"):
        load(tmp_path)


def test_a_tensor_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    write(tmp_path, weights=tensors() | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    with pytest.raises(ModelError, match=r"q_proj\.bias is not part of the architecture"):
        load(tmp_path)


def test_an_untied_head_is_needed_and_a_tied_one_may_be_there(tmp_path: Path) -> None:
    write(tmp_path, weights=tensors() | {"lm_head.weight": torch.randn(64, 16)})
    load(tmp_path)
    write(tmp_path, {"tie_word_embeddings": False})
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        load(tmp_path)


def test_sharded_files_load_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors())
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors()[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors: is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not a safetensors index"),
        ("[]", "is not a safetensors index"),
        ('{"weight_map": {"x": "../secret.safetensors"}}', "outside the folder"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (write(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=reason):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"GPT2LMHeadModel.*supported are Gemma3ForCausalLM.*Qwen3ForCausalLM",
        ),
        ({"architectures": None}, "supported are .*Qwen3ForCausalLM"),
        ({"hidden_size": "16"}, "hidden_size must be a whole number above 0, found '16'"),
        ({"vocab_size": None}, "vocab_size must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"attention_bias": "no"}, "attention_bias must be true or false"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"eos_token_id": 64}, "eos_token_id is"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu, gelu_pytorch_tanh"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 2 of full_attention"),
        ({"layer_types": ["full_attention", "chunked"]}, "layer_types must be a list of 2"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window must be a whole number"),
        ({"use_sliding_window": 1}, "use_sliding_window must be true or false"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type must be one of default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor must be a number above 0"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor must be a number"),
        ({"rope_theta": None}, "rope_theta must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        ModelConfig.from_folder(write(tmp_path, change))


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_an_unreadable_config_is_named(tmp_path: Path, text: str | None) -> None:
    write(tmp_path)
    path = tmp_path / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_the_rotary_base_of_transformers_5_is_read(tmp_path: Path) -> None:
    nested = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert {rope.theta for rope in ModelConfig.from_folder(write(tmp_path, nested)).ropes} == {5e5}


def test_end_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    write(tmp_path)
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2, 3)


def test_the_factory_reports_phases_and_resolves_options(tmp_path: Path) -> None:
    phases: list[str] = []
    engine = build_engine(
        write(tmp_path),
        EngineConfig(kv_cache_bytes=1 << 16, threads=1),
        on_phase=lambda phase, seconds: phases.append(phase),
    )
    assert phases == [name for name, _ in engine.info.startup] == ["weights", "pool", "warmup"]
    assert engine.info.config["backend"] == "cpu"
    assert engine.info.config["threads"] == 1
    assert isinstance(engine.info.config["batch_invariant"], bool)  # true on AVX2, measured
    assert engine.info.max_model_len == 128
    assert engine.info.eos_token_ids == (1,)
    assert engine.info.device["kind"] == "cpu"
    size = block_bytes(ModelConfig.from_folder(tmp_path), 16)
    assert engine.stats().gauges["kv_blocks_total"] == (1 << 16) // size - 1


def test_a_cache_too_small_for_two_blocks_is_refused_with_the_size_needed(tmp_path: Path) -> None:
    size = block_bytes(ModelConfig.from_folder(write(tmp_path)), 16)
    with pytest.raises(ConfigError, match=f"give it at least {2 * size} bytes"):
        build_engine(tmp_path, EngineConfig(kv_cache_bytes=2 * size - 1))
