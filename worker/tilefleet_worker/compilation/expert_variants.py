"""Variants of the kernels whose products are our own: mixtures of experts and stored weights.

Shapes: Qwen3-30B-A3B (128 experts, 8 chosen, 2048 × 768) in bf16 and in fp8 with blocks of 128×128,
and the MLP's first map of Llama 3.1 8B in fp8.
"""

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from tilefleet_worker.compilation.variant import Variant
from tilefleet_worker.kernels.mixture import (
    combine_kernel,
    expert_down_kernel,
    expert_gate_up_kernel,
)
from tilefleet_worker.kernels.mixture import tile_for as expert_tile
from tilefleet_worker.kernels.routing import LARGE_ROWS, SMALL_ROWS, route_kernel, sort_kernel
from tilefleet_worker.kernels.scaled_product import scaled_product_kernel, sum_parts_kernel
from tilefleet_worker.kernels.scaled_product import tile_for as product_tile

_HALF, _SINGLE, _INDEX, _INT = "*bf16", "*fp32", "*i32", "i32"
_FP8 = {"gfx942": "*fp8e4b8", "gfx950": "*fp8e4nv", "sm90": "*fp8e4nv"}
_FUSION = {"enable_fp_fusion": True}
_EXPERTS, _CHOSEN, _HIDDEN, _INNER, _BLOCK = 128, 8, 2048, 768, 128


def expert_variants(arch: str) -> Iterator[Variant]:
    """All variants of an architecture."""
    yield from _routing(arch)
    for weight in (_HALF, _FP8[arch]):
        for rows in (SMALL_ROWS, LARGE_ROWS):
            yield _expert_product(arch, True, weight, rows)
            yield _expert_product(arch, False, weight, rows)
    yield Variant(
        combine_kernel, "combine", f"{_HIDDEN} features, {_CHOSEN} experts", arch,
        {"made_ptr": _HALF, "weight_ptr": _SINGLE, "out_ptr": _HALF},
        {"HIDDEN": _HIDDEN, "TOP": _CHOSEN, "BLOCK": 1024}, _FUSION | {"num_warps": 4},
    )  # fmt: skip
    for count in (1, 4096):
        yield _scaled_product(arch, count)
    yield Variant(
        sum_parts_kernel, "sum_parts", "4096 features, 8 parts", arch,
        {"part_ptr": _SINGLE, "bias_ptr": _HALF, "out_ptr": _HALF, "rows": _INT},
        {"PARTS": 8, "FEATURES": 4096, "BIAS": True, "BLOCK": 1024}, _FUSION | {"num_warps": 4},
    )  # fmt: skip


def _routing(arch: str) -> Iterator[Variant]:
    yield Variant(
        route_kernel, "route", f"{_EXPERTS} experts, {_CHOSEN} chosen", arch,
        {"x_ptr": _HALF, "router_ptr": _HALF, "weight_ptr": _SINGLE, "chosen_ptr": _INDEX, "tokens": _INT},
        _loop(_HIDDEN, 64, False)
        | {"EXPERTS": _EXPERTS, "PAD": _EXPERTS, "TOP": _CHOSEN, "TOP_PAD": _CHOSEN, "NORMALIZED": True,
             "ROWS": SMALL_ROWS, "CT": tl.bfloat16},
        _FUSION | {"num_warps": 8, "num_stages": 3},
    )  # fmt: skip
    yield Variant(
        sort_kernel, "sort", f"{_EXPERTS} experts", arch,
        {"chosen_ptr": _INDEX, "pair_ptr": _INDEX, "expert_ptr": _INDEX, "pairs": _INT, "blocks": _INT},
        {"EXPERTS": _EXPERTS, "BINS": 256, "ROWS": SMALL_ROWS, "CHUNK": 1024}, _FUSION | {"num_warps": 4},
    )  # fmt: skip


def _loop(columns: int, step: int, scaled: bool) -> dict[str, Any]:
    return {"K": columns, "SCALE_K": _BLOCK if scaled else columns, "BLOCK_K": step, "EVEN": True}


def _expert_product(arch: str, up: bool, weight: str, rows: int) -> Variant:
    scaled, tile = weight != _HALF, expert_tile(arch, rows)
    types = {
        "x_ptr": _HALF, "weight_ptr": weight, "scale_ptr": _SINGLE if scaled else weight, "pair_ptr": _INDEX,
        "expert_ptr": _INDEX, "out_ptr": _HALF, "scale_stride": _INT, "scale_expert": _INT,
    }  # fmt: skip
    sizes = {"INNER": _INNER, "TOP": _CHOSEN} if up else {"HIDDEN": _HIDDEN}
    constants = _loop(_HIDDEN if up else _INNER, 128 if scaled else 64, scaled) | {
        "SCALE_N": _BLOCK if scaled else 0, "ROWS": rows, "BLOCK_N": tile.rows, "CT": tl.bfloat16, **sizes,
    }  # fmt: skip
    name = "expert gate and up" if up else "expert down"
    return Variant(
        expert_gate_up_kernel if up else expert_down_kernel, name.replace(" ", "_"),
        f"{'fp8' if scaled else 'bf16'}, blocks of {rows} rows", arch, types, constants, tile.options(),
    )  # fmt: skip


def _scaled_product(arch: str, count: int) -> Variant:
    rows, tile = product_tile(arch, count)
    types = {
        "x_ptr": _HALF, "weight_ptr": _FP8[arch], "scale_ptr": _SINGLE, "bias_ptr": _HALF, "out_ptr": _HALF,
        "rows": _INT, "scale_stride": _INT,
    }  # fmt: skip
    constants = _loop(4096, 128, True) | {
        "PART": 4096, "APART": False, "SCALE_N": _BLOCK, "FEATURES": 28672, "BIAS": False, "ROWS": rows, "BLOCK_N": tile.rows, "CT": tl.bfloat16,
    }  # fmt: skip
    return Variant(
        scaled_product_kernel,
        "scaled_product",
        f"fp8, {tile.rows} features × {rows} rows",
        arch,
        types,
        constants,
        tile.options(),
    )
