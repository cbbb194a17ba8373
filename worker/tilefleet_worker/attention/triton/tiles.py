"""Tile table: which tile sizes each architecture runs, with the evidence beside each entry.

No tuning at run time. An architecture that is not listed gets `fallback` and one warning from the
caller. sm90: swept on an H100 80GB, torch 2.11, Triton 3.6, 2026-11-24, block 64, bf16; figures in
docs/design/triton-attention.md. gfx942, gfx950: chosen by compile reports (docs/reference/kernels.md),
not measured: decode 32 keys and 2 warps, where 64 keys took 298 registers on gfx942 (one wave a SIMD)
and 32 leave room for three. Splits of 256 there as on sm90, predicted.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tilefleet_worker.target import arch_of


@dataclass(frozen=True)
class DecodeTile:
    """tile: keys per loop step. split: keys of a split of a short context, a multiple of tile.

    tma: keys and values come through TMA descriptors where a block holds a tile. registers: most of
    a lane, so that more programs share a multiprocessor; 0: as many as the compiler likes. programs: how
    many a launch wants where (sequence, KV head) pairs are few; changes no bit.
    """

    tile: int
    split: int
    warps: int
    stages: int
    tma: bool = False
    registers: int = 0
    programs: int = 2048


@dataclass(frozen=True)
class PrefillTile:
    """rows: query tokens per program. tile: keys per loop step. tma: as in DecodeTile."""

    rows: int
    tile: int
    warps: int
    stages: int
    tma: bool = False


DECODE: dict[str, DecodeTile] = {
    "sm90": DecodeTile(
        tile=64, split=256, warps=4, stages=3, tma=True, registers=168, programs=264
    ),
    "gfx942": DecodeTile(tile=32, split=256, warps=2, stages=2),
    "gfx950": DecodeTile(tile=32, split=256, warps=2, stages=2),
    "fallback": DecodeTile(tile=32, split=256, warps=4, stages=2),
}
# Heads of up to 64 dimensions, where the best tile is another one.
DECODE_NARROW: dict[str, DecodeTile] = {
    "sm90": DecodeTile(tile=64, split=256, warps=4, stages=2, tma=True, programs=512),
}
PREFILL: dict[str, PrefillTile] = {
    "sm90": PrefillTile(rows=64, tile=64, warps=4, stages=3, tma=True),
    "gfx942": PrefillTile(rows=128, tile=64, warps=8, stages=1),
    "gfx950": PrefillTile(rows=128, tile=64, warps=8, stages=1),
    "fallback": PrefillTile(rows=64, tile=32, warps=4, stages=2),
}


def decode_tile(arch: str, head_dim: int) -> DecodeTile:
    """Entry of the table for heads of this dimension."""
    return DECODE_NARROW.get(arch, DECODE[arch]) if head_dim <= 64 else DECODE[arch]


def architecture(device: torch.device) -> str:
    """gfx942, gfx950 or sm90; "fallback" for every other device."""
    name = arch_of(device)
    return name if name in DECODE else "fallback"


def launch_options(tile: DecodeTile | PrefillTile) -> dict[str, Any]:
    """Launch options; fp fusion is pinned: Triton 3.10 changes its default, and with it bits."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if isinstance(tile, DecodeTile) and tile.registers:
        options["maxnreg"] = tile.registers
    return options
