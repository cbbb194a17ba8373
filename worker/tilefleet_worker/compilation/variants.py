"""Every kernel in every configuration that is shipped, described for a compiler without a GPU.

Two attention shapes stand for the models: 32 heads over 8 of 128 dimensions (Llama 3 8B, Qwen3),
and 14 over 2 of 64 (Qwen2.5 0.5B). Blocks of 64 tokens hold a tile, blocks of 16 do not, which are
two code paths. Tile sizes and launch options come from the tile table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from tilefleet_worker.attention.triton.decode import paged_decode_kernel
from tilefleet_worker.attention.triton.prefill import paged_prefill_kernel
from tilefleet_worker.attention.triton.tiles import (
    PREFILL,
    DecodeTile,
    PrefillTile,
    decode_tile,
    launch_options,
)
from tilefleet_worker.compilation.expert_variants import expert_variants
from tilefleet_worker.compilation.product_variants import product_variants
from tilefleet_worker.compilation.sampling_variants import sampling_variants
from tilefleet_worker.compilation.variant import Variant
from tilefleet_worker.kernels.norm import add_rms_norm_kernel
from tilefleet_worker.kernels.rotary_store import rotary_store_kernel
from tilefleet_worker.kernels.swiglu import swiglu_kernel

_HALF, _SINGLE, _INDEX, _INT, _FLOAT = "*bf16", "*fp32", "*i32", "i32", "fp32"


@dataclass(frozen=True)
class Shape:
    """Attention of a model: query heads a KV head, head dimensions, tokens of a block."""

    group: int
    head_dim: int
    block: int

    @property
    def title(self) -> str:
        """As in tables."""
        return f"group {self.group}, d {self.head_dim}, block {self.block}"


SHAPES = (Shape(4, 128, 64), Shape(4, 128, 16), Shape(7, 64, 64))


def variants(arch: str) -> Iterator[Variant]:
    """All variants of an architecture."""
    for shape in SHAPES:
        yield _decode(arch, shape)
    for shape in SHAPES:
        yield _prefill(arch, shape)
    fusion = {"enable_fp_fusion": True}
    types = {"residual_ptr": _SINGLE, "delta_ptr": _HALF, "weight_ptr": _HALF, "out_ptr": _HALF}
    yield Variant(
        add_rms_norm_kernel, "norm", "4096 features", arch,
        types | {"eps": _FLOAT, "stride_delta": _INT}, {"FEATURES": 4096, "PAD": 4096, "ADD": True},
        fusion | {"num_warps": 8},
    )  # fmt: skip
    yield Variant(
        swiglu_kernel, "swiglu", "blocks of 1024", arch,
        {"gate_up_ptr": _HALF, "out_ptr": _HALF, "inner": _INT}, {"BLOCK": 1024},
        fusion | {"num_warps": 4},
    )  # fmt: skip
    yield Variant(
        rotary_store_kernel, "rotary_store", "32/8 heads, d 128, normed", arch,
        {"qkv_ptr": _HALF, "position_ptr": _INDEX, "slot_ptr": _INDEX, "table_ptr": _SINGLE,
             "q_norm_ptr": _HALF, "k_norm_ptr": _HALF, "q_ptr": _HALF, "k_ptr": _HALF, "v_ptr": _HALF, "eps": _FLOAT}
        | _strides("kb kt kh vb vt vh"),
        {"HEADS": 32, "KV_HEADS": 8, "TOGETHER": 8, "DIM": 128, "ROTATED": 128, "HALF_PAD": 64, "DIM_PAD": 128, "BLOCK": 64,
             "NORM": True},
        fusion | {"num_warps": 1},
    )  # fmt: skip
    yield from expert_variants(arch)
    yield from product_variants(arch)
    yield from sampling_variants(arch)


def _strides(names: str) -> dict[str, str]:
    return {f"stride_{name}": _INT for name in names.split()}


def _uses_tma(shape: Shape, tile: DecodeTile | PrefillTile) -> bool:
    return tile.tma and shape.block % tile.tile == 0


def _attention_types(shape: Shape, tile: DecodeTile | PrefillTile) -> dict[str, str]:
    cache = _HALF
    if _uses_tma(shape, tile):
        cache = f"tensordesc<bf16[{tile.tile}, {shape.head_dim}]>"
    return {
        "q_ptr": _HALF, "k_ptr": cache, "v_ptr": cache, "table_ptr": _INDEX, "sink_ptr": _HALF, "out_ptr": _HALF,
        "scale_log2": _FLOAT, "softcap_log2": _FLOAT, "window": _INT,
    } | _strides("q kb kt kh vb vt vh table")  # fmt: skip


def _attention_constants(shape: Shape) -> dict[str, Any]:
    return {
        "GROUP": shape.group, "DIM": shape.head_dim, "DIM_PAD": triton.next_power_of_2(shape.head_dim),
        "BLOCK": shape.block, "HAS_SINK": False, "SOFTCAP": False, "WINDOW": False, "CT": tl.bfloat16,
    }  # fmt: skip


def _decode(arch: str, shape: Shape) -> Variant:
    tile = decode_tile(arch, shape.head_dim)
    types = _attention_types(shape, tile) | {
        "context_ptr": _INDEX,
        "part_ptr": _SINGLE,
        "stat_ptr": _SINGLE,
        "count_ptr": _INDEX,
        "splits": _INT,
        "least": _INT,
    }
    rows = max(16, triton.next_power_of_2(shape.group))
    constants = {
        "KV_HEADS": 8,
        "ROWS": rows,
        "TILE": tile.tile,
        "SPLIT": tile.split,
        "TMA": _uses_tma(shape, tile),
    }
    return Variant(
        paged_decode_kernel, "decode", shape.title, arch, types,
        _attention_constants(shape) | constants, launch_options(tile),
    )  # fmt: skip


def _prefill(arch: str, shape: Shape) -> Variant:
    tile = PREFILL[arch]
    tma = _uses_tma(shape, tile)
    constants = {"ROWS": tile.rows, "TILE": tile.tile, "TMA": tma}
    queries = {"q_ptr": f"tensordesc<bf16[{tile.rows}, {shape.head_dim}]>"} if tma else {}
    return Variant(
        paged_prefill_kernel, "prefill", shape.title, arch,
        _attention_types(shape, tile) | {"tile_ptr": _INDEX} | queries,
        _attention_constants(shape) | constants, launch_options(tile),
    )  # fmt: skip
