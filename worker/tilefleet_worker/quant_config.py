"""How the quantised matrices of a checkpoint are stored, as its config says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilefleet_worker.config_reader import ConfigReader

QUANTISATIONS = (
    "fp8 (per tensor; blocks such as 128×128)",
    "compressed-tensors fp8 and int8 (per tensor, channel, group or block)",
)
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """value = (stored - zero point) · scale, with one scale for each block of a matrix.

    Activations are never quantised here: results are those of the dequantised weights.
    """

    method: str
    stored: str
    """float8_e4m3fn or int8."""
    block: tuple[int, int]
    """Rows and columns that share a scale; 0: all of them."""


def read_quantization(reader: ConfigReader) -> QuantConfig | None:
    """The quantisation of a config.json; None when there is none. Raises ModelError."""
    if not reader.get("quantization_config"):
        return None
    child = reader.child("quantization_config")
    method = child.one_of("quant_method", ("fp8", "compressed-tensors"))
    return _fp8(child) if method == "fp8" else _compressed_tensors(child)


def _fp8(reader: ConfigReader) -> QuantConfig:
    reader.one_of("fmt", ("e4m3",), "e4m3")
    return QuantConfig("fp8", "float8_e4m3fn", _pair(reader, "weight_block_size") or (0, 0))


def _compressed_tensors(reader: ConfigReader) -> QuantConfig:
    reader.one_of("format", _FORMATS)
    groups = reader.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise reader.error("config_groups", "an object with a group")
    found = {_weights_of(reader, name) for name in groups}
    if len(found) > 1:
        raise reader.error("config_groups", "groups that store weights alike")
    return found.pop()


def _weights_of(reader: ConfigReader, name: str) -> QuantConfig:
    """The arguments of the weights of one group."""
    weights = reader.child("config_groups").child(name).child("weights")
    if weights.get("num_bits") != 8:
        raise weights.error("num_bits", "8")
    kind = weights.one_of("type", ("float", "int"))
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"))
    block: tuple[int, int] | None = {"tensor": (0, 0), "channel": (1, 0)}.get(strategy)
    if strategy == "group":
        block = (1, weights.positive("group_size"))
    elif strategy == "block":
        block = _pair(weights, "block_structure")
    if block is None:
        raise weights.error("block_structure", "two whole numbers above 0")
    return QuantConfig("compressed-tensors", "float8_e4m3fn" if kind == "float" else "int8", block)


def _pair(reader: ConfigReader, key: str) -> tuple[int, int] | None:
    """Two numbers, as a list or as text like 128x128."""
    value: Any = reader.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        value = [int(part) for part in value.split("x") if part.isdigit()]
    sizes = isinstance(value, list) and all(isinstance(n, int) and n > 0 for n in value)
    if not sizes or len(value) != 2:
        raise reader.error(key, "two whole numbers above 0")
    return value[0], value[1]
