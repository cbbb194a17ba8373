"""Variants of the few-row products: every kind at the fewest and the most rows of a tile.

Shapes: Llama 3.1 8B's hidden size; a matrix that the table splits, and one that it does not.
"""

from collections.abc import Iterator

import triton.language as tl

from tilefleet_worker.compilation.variant import Variant
from tilefleet_worker.kernels.few_rows import begin_kernel, few_rows_kernel
from tilefleet_worker.kernels.product_tiles import GROUP, TILES
from tilefleet_worker.kernels.products import piece_levels

_HALF, _SINGLE, _INDEX, _INT, _FLOAT = "*bf16", "*fp32", "*i32", "i32", "fp32"
_HIDDEN = 4096
_GROUPS = _HIDDEN // GROUP
_TYPES = {
    "x_ptr": _HALF, "weight_ptr": _HALF, "bias_ptr": _HALF, "square_ptr": _SINGLE,
    "residual_ptr": _SINGLE, "norm_ptr": _HALF, "out_ptr": _HALF, "square_out_ptr": _SINGLE,
    "part_ptr": _SINGLE, "count_ptr": _INDEX, "rows": _INT, "features": _INT, "inner": _INT,
    "splits": _INT, "eps": _FLOAT,
    "part": _INT,
}  # fmt: skip
# kind: whether it gates, whether it adds to the stream
_KINDS = {"normed": (False, False), "gated": (True, False), "adding": (False, True)}


def product_variants(arch: str) -> Iterator[Variant]:
    """All variants of an architecture."""
    for kind in _KINDS:
        for rows in (min(TILES[arch].plain), max(TILES[arch].plain)):
            yield _product(arch, kind, rows)
    yield Variant(
        begin_kernel, "begin", f"{_HIDDEN} features", arch,
        {"residual_ptr": _SINGLE, "norm_ptr": _HALF, "out_ptr": _HALF, "square_ptr": _SINGLE},
        {"FEATURES": _HIDDEN, "PAD": _HIDDEN, "GROUP": GROUP, "GROUP_LEVELS": _log2(GROUP)},
        {"enable_fp_fusion": True, "num_warps": 8},
    )  # fmt: skip


def _product(arch: str, kind: str, rows: int) -> Variant:
    gated, adds = _KINDS[kind]
    tile = TILES[arch].of(rows, 14336 if gated else 1024, _HIDDEN, gated)
    types = _TYPES
    if tile.tma:
        types = _TYPES | {
            "x_ptr": f"tensordesc<bf16[{tile.rows}, {tile.depth}]>",
            "weight_ptr": f"tensordesc<bf16[{tile.columns}, {tile.depth}]>",
        }
    groups = 0 if adds else _GROUPS
    constants = {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "SPLIT": tile.splits > 1,
        "GROUP": GROUP, "GROUP_LEVELS": _log2(GROUP), "SQUARES": groups,
        "SQUARE_LEVELS": _log2(groups) if groups else 0,
        "PIECE_LEVELS": piece_levels(groups, tile.rows, tile.warps), "EVEN": True, "GATED": gated,
        "RESIDUAL": adds, "BIAS": False, "TMA": tile.tma, "CT": tl.bfloat16,
    }  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return Variant(
        few_rows_kernel, "few_rows", f"{kind}, {tile.columns} features × {tile.rows} rows", arch,
        types, constants, options | dict(tile.options),
    )  # fmt: skip


def _log2(power: int) -> int:
    return power.bit_length() - 1
