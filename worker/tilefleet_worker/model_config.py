"""What a model folder says about its model: read, validated, frozen."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilefleet_worker.errors import ModelError

# Architecture as config.json names it → module under tilefleet_worker.models.
ARCHITECTURES: Mapping[str, str] = {"Qwen3ForCausalLM": "qwen3"}


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
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json and, for the end tokens, generation_config.json when it is there.

        Raises ModelError naming the file, the key, and what was expected.
        """
        path = folder / "config.json"
        raw = _read_json(path)
        generation_path = folder / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        return cls.from_dict(raw, generation, str(path))

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], generation: Mapping[str, Any], source: str
    ) -> "ModelConfig":
        """Build from the two parsed files. `source` names the first in errors."""
        reader = _Reader(raw, source)
        architecture = _architecture(raw, source)
        _refuse_unsupported(raw, source)
        num_heads = reader.positive("num_attention_heads")
        hidden_size = reader.positive("hidden_size")
        config = cls(
            architecture=architecture,
            vocab_size=reader.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.positive("intermediate_size"),
            num_layers=reader.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.positive("num_key_value_heads", num_heads),
            head_dim=reader.positive("head_dim", hidden_size // num_heads),
            max_positions=reader.positive("max_position_embeddings"),
            rms_norm_eps=reader.number("rms_norm_eps"),
            rope_theta=_rope_theta(raw, source),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            attention_bias=reader.flag("attention_bias"),
            eos_token_ids=_eos_token_ids(raw, generation),
        )
        config._check_shapes(source)
        return config

    def _check_shapes(self, source: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{source}: num_attention_heads is {self.num_heads}, which is not a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ModelError(f"{source}: head_dim is {self.head_dim}: rotary needs an even one.")
        if any(not 0 <= token < self.vocab_size for token in self.eos_token_ids):
            raise ModelError(
                f"{source}: eos_token_id is {list(self.eos_token_ids)}, but the vocabulary has "
                f"{self.vocab_size} tokens."
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, found {type(value).__name__}.")
    return value


class _Reader:
    """Typed access to one JSON object, with errors that name file, key, rule and value."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self._raw = raw
        self._source = source

    def _error(self, key: str, rule: str) -> ModelError:
        found = repr(self._raw[key]) if key in self._raw else "nothing"
        return ModelError(f"{self._source}: {key} must be {rule}, found {found}.")

    def positive(self, key: str, default: int | None = None) -> int:
        value = self._raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(key, "a whole number above 0")
        return value

    def number(self, key: str) -> float:
        value = self._raw.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self._error(key, "a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._raw.get(key, False)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value


def _architecture(raw: Mapping[str, Any], source: str) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    raise ModelError(
        f"{source}: architectures is {names}; supported are {', '.join(sorted(ARCHITECTURES))}."
    )


def _refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    """Refuse what would be computed wrongly without an error."""
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    activation = raw.get("hidden_act", "silu")
    for refused, message in (
        (raw.get("quantization_config"), "quantization_config: quantized weights"),
        (raw.get("use_sliding_window"), "use_sliding_window: sliding-window attention"),
        (layer_types - {"full_attention"}, f"layer_types {sorted(layer_types)}: mixed attention"),
        (activation != "silu", f"hidden_act {activation!r}: activations other than silu"),
    ):
        if refused:
            raise ModelError(f"{source}: {message} are not supported; use another model.")


def _rope_theta(raw: Mapping[str, Any], source: str) -> float:
    """Base of the rotary frequencies: transformers 5 nests it in rope_parameters, 4 does not."""
    nested = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or nested
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ModelError(
            f"{source}: rope scaling {kind!r} is not supported; only the default rotary embedding "
            "is. Remove rope_scaling to serve the model at its trained length."
        )
    theta = nested.get("rope_theta", raw.get("rope_theta"))
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise ModelError(f"{source}: rope_theta must be a number above 0, found {theta!r}.")
    return float(theta)


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens; generation_config.json wins, because instruct models list more of them there."""
    value = generation.get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
