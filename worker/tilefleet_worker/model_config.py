"""What a model folder says about its model: read, validated, frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilefleet_worker.config_reader import ConfigReader, read_json
from tilefleet_worker.errors import ModelError
from tilefleet_worker.families import ARCHITECTURES, Family
from tilefleet_worker.quant_config import QuantConfig, read_quantization
from tilefleet_worker.rope_config import RopeConfig

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of an MLP."""

    count: int
    chosen: int
    """Experts of a token."""
    intermediate_size: int
    normalized: bool
    """Whether the weights of a token's experts sum to 1."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder with grouped-query attention, as far as the engine needs to know it."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Longest sequence, rope scaling included."""
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str
    attention_scale: float
    windows: tuple[int, ...]
    """Latest keys that each layer sees; 0: all."""
    ropes: tuple[RopeConfig, ...]
    """Rotary embedding of each layer."""
    eos_token_ids: tuple[int, ...]
    attention_soft_cap: float = 0.0
    logits_soft_cap: float = 0.0
    experts: ExpertsConfig | None = None
    sparse_layers: tuple[bool, ...] = ()
    """Layers that have experts."""
    quantization: QuantConfig | None = None
    family: Family = field(default=ARCHITECTURES["LlamaForCausalLM"], repr=False)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json and, for the end tokens, generation_config.json when it is there.

        Raises ModelError naming the file, the key, and what was expected.
        """
        path = folder / "config.json"
        raw = read_json(path)
        generation_path = folder / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        return cls.from_dict(raw, generation, str(path))

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], generation: Mapping[str, Any], source: str
    ) -> "ModelConfig":
        """Build from the two parsed files. `source` names the first in errors."""
        architecture = _architecture(raw, source)
        family = ARCHITECTURES[architecture]
        whole = ConfigReader(raw, source, family.defaults)
        reader = whole
        if family.text_key and family.text_key in raw:
            reader = whole.child(family.text_key, family.defaults)
        num_layers = reader.positive("num_hidden_layers")
        windows = family.windows(reader, num_layers)
        ropes = family.ropes(reader, windows)
        num_heads, hidden_size = (
            reader.positive("num_attention_heads"),
            reader.positive("hidden_size"),
        )
        head_dim = reader.positive("head_dim", hidden_size // num_heads)
        positions = reader.positive("max_position_embeddings")
        bias = reader.flag("attention_bias")
        sparse = family.sparse_layers(reader, num_layers)
        config = cls(
            architecture=architecture,
            vocab_size=reader.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.positive("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=reader.positive("num_key_value_heads", num_heads),
            head_dim=head_dim,
            max_positions=min(rope.max_positions(positions) for rope in ropes),
            rms_norm_eps=reader.number("rms_norm_eps"),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=bias if family.output_bias is None else family.output_bias,
            mlp_bias=reader.flag("mlp_bias"),
            activation=reader.one_of(family.activation_key, ACTIVATIONS, "silu"),
            attention_scale=_scale_base(reader, family, head_dim) ** -0.5,
            attention_soft_cap=_optional(reader, "attn_logit_softcapping"),
            logits_soft_cap=_optional(reader, "final_logit_softcapping"),
            windows=windows,
            ropes=ropes,
            experts=_experts(reader, family) if any(sparse) else None,
            sparse_layers=sparse,
            quantization=read_quantization(whole),
            eos_token_ids=_eos_token_ids(reader, whole, generation),
            family=family,
        )
        config._check(reader)
        return config

    def _check(self, reader: ConfigReader) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{reader.source}: num_attention_heads is {self.num_heads}, which is not a "
                f"multiple of num_key_value_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ModelError(
                f"{reader.source}: head_dim is {self.head_dim}: rotary needs an even one."
            )
        if reader.get("use_bidirectional_attention"):
            raise reader.error("use_bidirectional_attention", "false, because decoders look back")
        if any(not 0 <= token < self.vocab_size for token in self.eos_token_ids):
            raise ModelError(
                f"{reader.source}: eos_token_id is {list(self.eos_token_ids)}, but the vocabulary "
                f"has {self.vocab_size} tokens."
            )


def _architecture(raw: Mapping[str, Any], source: str) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    raise ModelError(
        f"{source}: architectures is {names}; supported are {', '.join(sorted(ARCHITECTURES))}."
    )


def _scale_base(reader: ConfigReader, family: Family, head_dim: int) -> float:
    return reader.number(family.scale_key) if family.scale_key else float(head_dim)


def _optional(reader: ConfigReader, key: str) -> float:
    return reader.number(key) if reader.get(key) else 0.0


def _experts(reader: ConfigReader, family: Family) -> ExpertsConfig:
    names = family.experts
    if names is None:
        raise reader.error("architectures", "a family with experts")
    key = next((key for key in names.count_keys if reader.get(key)), names.count_keys[0])
    experts = ExpertsConfig(
        count=reader.positive(key),
        chosen=reader.positive("num_experts_per_tok"),
        intermediate_size=reader.positive(names.inner_key),
        normalized=names.normalize_key is None or reader.flag(names.normalize_key),
    )
    if experts.chosen > experts.count:
        raise reader.error("num_experts_per_tok", f"at most the {experts.count} experts there are")
    return experts


def _eos_token_ids(
    reader: ConfigReader, whole: ConfigReader, generation: Mapping[str, Any]
) -> tuple[int, ...]:
    """End tokens; generation_config.json wins, because instruct models list more of them there."""
    value = generation.get("eos_token_id")
    for config in (whole, reader):
        value = config.get("eos_token_id") if value is None else value
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
