"""Which rotary embedding a config asks for: kinds, their numbers, and the positions they reach."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilefleet_worker.config_reader import ConfigReader

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding. Numbers that its kind does not use are 0."""

    kind: str
    theta: float
    factor: float = 1.0
    """Times the trained positions that the scaling is made for."""
    original_positions: int = 0
    """Positions of the training before the scaling: llama3 and yarn."""
    low_frequency_factor: float = 0.0
    high_frequency_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    amplitude: float = 1.0
    """Factor of cosine and sine: yarn's attention factor."""
    truncate: bool = False
    """yarn: whether the bounds of its ramp are whole numbers."""

    def max_positions(self, configured: int) -> int:
        """Positions that the model can serve, given max_position_embeddings.

        linear and yarn leave that number as it was trained. dynamic changes its frequencies with
        the length beyond it, which contradicts a cache of keys, so it ends there.
        """
        if self.kind == "linear":
            return int(configured * self.factor)
        if self.kind == "yarn":
            return max(configured, int(self.original_positions * self.factor))
        return configured


def read_rope(reader: ConfigReader, default_theta: float | None = None) -> RopeConfig:
    """The one rotary embedding of a config: transformers 5 nests all of it, 4 only the scaling."""
    values: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        values |= reader.get(key) or {}
    values.setdefault("rope_theta", reader.get("rope_theta", default_theta))
    if reader.get("original_max_position_embeddings"):
        values["original_max_position_embeddings"] = reader.get("original_max_position_embeddings")
    share = reader.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise reader.error("partial_rotary_factor", "1, because whole heads are rotated")
    return parse_rope(values, f"{reader.source}: rope", reader.positive("max_position_embeddings"))


def parse_rope(values: Mapping[str, Any], source: str, max_positions: int) -> RopeConfig:
    """One set of rope parameters, checked. Raises ModelError."""
    kind = values.get("rope_type", values.get("type"))
    reader = ConfigReader({**values, "rope_type": kind}, source)
    kind = reader.one_of("rope_type", ROPE_KINDS, "default")
    theta = reader.number("rope_theta")
    if reader.get("partial_rotary_factor", 1.0) != 1.0:
        raise reader.error("partial_rotary_factor", "1, because whole heads are rotated")
    if kind == "default":
        return RopeConfig(kind, theta)
    if kind in ("linear", "dynamic"):
        return RopeConfig(kind, theta, reader.number("factor"))
    original = reader.positive("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return RopeConfig(
            kind,
            theta,
            reader.number("factor"),
            original,
            low_frequency_factor=reader.number("low_freq_factor"),
            high_frequency_factor=reader.number("high_freq_factor"),
        )
    factor = reader.number("factor", max_positions / original)
    return RopeConfig(
        kind,
        theta,
        factor,
        original,
        beta_fast=reader.number("beta_fast", 32.0),
        beta_slow=reader.number("beta_slow", 1.0),
        amplitude=_yarn_amplitude(reader, factor),
        truncate=reader.flag("truncate", True),
    )


def _yarn_amplitude(reader: ConfigReader, factor: float) -> float:
    """0.1 · ln(factor) + 1, unless the config says otherwise (Peng et al., 2023, §3.4)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if reader.get("attention_factor") is not None:
        return reader.number("attention_factor")
    if reader.get("mscale") and reader.get("mscale_all_dim"):
        return scale(reader.number("mscale")) / scale(reader.number("mscale_all_dim"))
    return scale(1.0)
