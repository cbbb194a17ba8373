"""Gemma 3, text only: five windowed layers for each full one, two rotary bases, normed outputs.

Source: Gemma 3 report (arXiv 2503.19786). Its published configs leave most keys out.
"""

from tilefleet_worker.config_reader import ConfigReader
from tilefleet_worker.families.family import Family, layer_types, windows_by_type
from tilefleet_worker.rope_config import RopeConfig, parse_rope


def _windows(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Every sixth layer is full, unless the config says otherwise."""
    types = layer_types(reader, num_layers)
    if types is None:
        pattern = reader.positive("sliding_window_pattern", 6)
        types = [
            "sliding_attention" if (i + 1) % pattern else "full_attention"
            for i in range(num_layers)
        ]
    return windows_by_type(reader, types)


def _ropes(reader: ConfigReader, windows: tuple[int, ...]) -> tuple[RopeConfig, ...]:
    """A base for full layers, which alone may be scaled, and a smaller one for windowed layers."""
    nested = reader.get("rope_parameters") or {}
    full = {"rope_theta": reader.get("rope_theta", 1e6), **(reader.get("rope_scaling") or {})}
    full |= nested.get("full_attention") or {}
    local = {"rope_theta": reader.get("rope_local_base_freq", 1e4)}
    local |= nested.get("sliding_attention") or {}
    positions, source = reader.positive("max_position_embeddings"), f"{reader.source}: rope"
    rope, local_rope = parse_rope(full, source, positions), parse_rope(local, source, positions)
    return tuple(local_rope if window else rope for window in windows)


GEMMA3 = Family(
    "Gemma 3 (text)",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    text_key="text_config",
    prefixes=("model", "language_model.model", "model.language_model"),
    other_parts=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
    qk_norm=True,
    norm_offset=1.0,
    sandwich_norms=True,
    scaled_embedding=True,
    activation_key="hidden_activation",
    scale_key="query_pre_attn_scalar",
    windows=_windows,
    ropes=_ropes,
)
