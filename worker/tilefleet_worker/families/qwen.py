"""Qwen2, Qwen2.5 and Qwen3: windows from a layer on; Qwen2 has biases, Qwen3 norms instead.

Sources: Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388) reports, their published configs.
"""

from tilefleet_worker.config_reader import ConfigReader
from tilefleet_worker.families.family import (
    ExpertNames,
    Family,
    layer_types,
    window_everywhere,
    windows_by_type,
)


def _windows(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """The first max_window_layers layers see everything, the others a window."""
    types = layer_types(reader, num_layers)
    if types is None:
        switched_on = reader.flag("use_sliding_window")
        full = reader.get("max_window_layers", 28) if switched_on else num_layers
        types = ["full_attention" if i < full else "sliding_attention" for i in range(num_layers)]
    return windows_by_type(reader, types)


def _moe_windows(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    if not reader.flag("use_sliding_window"):
        return (0,) * num_layers
    return window_everywhere(reader, num_layers)


def _sparse_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Every decoder_sparse_step-th layer, but for the listed ones."""
    dense = set(reader.get("mlp_only_layers", []))
    step = reader.positive("decoder_sparse_step", 1)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))


QWEN2 = Family(
    "Qwen2, Qwen2.5",
    ("Qwen2ForCausalLM",),
    qkv_bias=True,
    output_bias=False,
    windows=_windows,
)

QWEN3 = Family("Qwen3", ("Qwen3ForCausalLM",), qk_norm=True, windows=_windows)

QWEN3_MOE = Family(
    "Qwen3-MoE",
    ("Qwen3MoeForCausalLM",),
    qk_norm=True,
    windows=_moe_windows,
    sparse_layers=_sparse_layers,
    experts=ExpertNames(
        router="mlp.gate",
        experts="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        count_keys=("num_experts", "num_local_experts"),
        inner_key="moe_intermediate_size",
        normalize_key="norm_topk_prob",
    ),
)
