"""What can differ between families of decoders. The defaults are Llama's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tilefleet_worker.config_reader import ConfigReader
from tilefleet_worker.rope_config import RopeConfig, read_rope

_LAYER_TYPES = ("full_attention", "sliding_attention")

LayerReader = Callable[[ConfigReader, int], tuple[int, ...]]
"""Called with the config and the number of layers; one number a layer."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a family keeps its experts: tensor names in a layer, and keys of config.json."""

    router: str
    """Name of the router's matrix, without .weight."""
    experts: str
    """Name before the expert's number."""
    gate: str
    up: str
    down: str
    count_keys: tuple[str, ...]
    inner_key: str
    """Key of an expert's inner size."""
    normalize_key: str | None
    """Key that says whether the chosen experts' weights sum to 1; None: they do."""


def no_windows(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Every layer sees everything."""
    types = reader.list_of("layer_types", num_layers, _LAYER_TYPES) or []
    if "sliding_attention" in types or reader.get("use_sliding_window"):
        raise reader.error("layer_types", "full attention in this family")
    return (0,) * num_layers


def window_everywhere(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """sliding_window holds for every layer; null or 0 is none."""
    window = reader.positive("sliding_window") if reader.get("sliding_window") else 0
    return (window,) * num_layers


def windows_by_type(reader: ConfigReader, types: list[str]) -> tuple[int, ...]:
    """sliding_window for the layers of that type, 0 for the full ones."""
    if "sliding_attention" not in types:
        return (0,) * len(types)
    window = reader.positive("sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def layer_types(reader: ConfigReader, num_layers: int) -> list[str] | None:
    """What config.json says of each layer; None when it says nothing."""
    return reader.list_of("layer_types", num_layers, _LAYER_TYPES)


def one_rope(reader: ConfigReader, windows: tuple[int, ...]) -> tuple[RopeConfig, ...]:
    """The same rotary embedding in every layer."""
    return (read_rope(reader),) * len(windows)


def no_sparse_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """No layer has experts."""
    return (False,) * num_layers


@dataclass(frozen=True, slots=True)
class Family:
    """A family of checkpoints, as it differs from Llama."""

    title: str
    architectures: tuple[str, ...]
    """Names in config.json's `architectures`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that its published configs leave out."""
    text_key: str = ""
    """Key of the text model's object, when config.json describes more than text."""
    prefixes: tuple[str, ...] = ("model",)
    """Names before `embed_tokens`, `layers` and `norm`; the first one found is used."""
    other_parts: tuple[str, ...] = ()
    """Beginnings of tensor names that belong to other modalities."""
    qkv_bias: bool | None = None
    """Bias of queries, keys and values; None: as attention_bias says."""
    output_bias: bool | None = None
    """Bias of the attention's output; None: as attention_bias says."""
    qk_norm: bool = False
    """Queries and keys are normed, each head by itself."""
    norm_offset: float = 0.0
    """Added to the stored weights of norms: Gemma stores w - 1."""
    sandwich_norms: bool = False
    """Outputs of attention and MLP are normed too, before they are added."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by √hidden_size."""
    activation_key: str = "hidden_act"
    scale_key: str = ""
    """Key of s in the scores' scale 1/√s; empty: s is head_dim."""
    windows: LayerReader = no_windows
    ropes: Callable[[ConfigReader, tuple[int, ...]], tuple[RopeConfig, ...]] = one_rope
    experts: ExpertNames | None = None
    sparse_layers: Callable[[ConfigReader, int], tuple[bool, ...]] = no_sparse_layers
    """Which layers have experts instead of one MLP."""
