"""Shapes of models that can be named without a folder, as their published configs have them."""

from pathlib import Path
from typing import Any

from tilefleet_worker.errors import ConfigError
from tilefleet_worker.model_config import ModelConfig

_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def _shape(architecture: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """sizes: vocabulary, hidden, inner, layers, heads, KV heads, head dim, positions."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    )  # fmt: skip
    common = {"architectures": [architecture], "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    return {**common, **dict(zip(names, sizes, strict=True)), **more}


_LLAMA_8B = (128_256, 4096, 14_336, 32, 32, 8, 128, 131_072)
_LLAMA_70B = (128_256, 8192, 28_672, 80, 64, 8, 128, 131_072)
_QWEN3_06B = (151_936, 1024, 3072, 28, 16, 8, 128, 40_960)
_QWEN3_30B = (151_936, 2048, 6144, 48, 32, 4, 128, 40_960)
_MIXTRAL = (32_000, 4096, 14_336, 32, 32, 8, 128, 32_768)
_QWEN3_EXPERTS = {
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _shape("Qwen3ForCausalLM", _QWEN3_06B, tie_word_embeddings=True),
    "llama-3.1-8b": _shape("LlamaForCausalLM", _LLAMA_8B),
    "llama-3.1-8b-fp8": _shape("LlamaForCausalLM", _LLAMA_8B, quantization_config=_FP8),
    "llama-3.1-70b": _shape("LlamaForCausalLM", _LLAMA_70B),
    "qwen3-30b-a3b": _shape("Qwen3MoeForCausalLM", _QWEN3_30B, **_QWEN3_EXPERTS),
    "qwen3-30b-a3b-fp8": _shape(
        "Qwen3MoeForCausalLM", _QWEN3_30B, quantization_config=_FP8, **_QWEN3_EXPERTS
    ),
    "mixtral-8x7b": _shape(
        "MixtralForCausalLM", _MIXTRAL, num_local_experts=8, num_experts_per_tok=2
    ),
}


def named_config(model: str) -> ModelConfig:
    """Config of a named shape, or that of a folder.

    Raises ConfigError when it is neither, ModelError when the config is of another family.
    """
    if model in SHAPES:
        return ModelConfig.from_dict(SHAPES[model], {}, model)
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model {model!r} is neither a folder with a config.json nor one of "
            f"{', '.join(SHAPES)}."
        )
    return ModelConfig.from_folder(folder)
