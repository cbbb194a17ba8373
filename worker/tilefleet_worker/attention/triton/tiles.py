"""Tile table: which tile sizes each architecture runs, with the evidence beside each entry.

No tuning at run time. An architecture that is not listed gets `fallback` and one warning from the
caller. sm90: swept on an H100 80GB, torch 2.11, Triton 3.6, 2026-11-24, block 64, bf16, with
`benchmarks/gpu_attention.py --sweep`; figures in docs/design/triton-attention.md. gfx942, gfx950:
chosen by compile reports (docs/reference/kernels.md), not measured: decode 32 keys and 2 warps, as
64 keys take 298 to 302 registers on gfx942 (one wave a SIMD, and 4 spills at blocks of 16) where
32 take 181 to 197 (two waves), and 158 to 160 on gfx950 (three waves).
"""

from dataclasses import dataclass
from typing import Any

import torch

from tilefleet_worker.target import arch_of


@dataclass(frozen=True)
class DecodeTile:
    """tile: keys per loop step. split: keys per program, fixed, a multiple of tile."""

    tile: int
    split: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PrefillTile:
    """rows: query tokens per program. tile: keys per loop step."""

    rows: int
    tile: int
    warps: int
    stages: int


DECODE: dict[str, DecodeTile] = {
    "sm90": DecodeTile(tile=64, split=1024, warps=8, stages=3),
    "gfx942": DecodeTile(tile=32, split=512, warps=2, stages=2),
    "gfx950": DecodeTile(tile=32, split=512, warps=2, stages=2),
    "fallback": DecodeTile(tile=32, split=512, warps=4, stages=2),
}
PREFILL: dict[str, PrefillTile] = {
    "sm90": PrefillTile(rows=64, tile=64, warps=4, stages=3),
    "gfx942": PrefillTile(rows=128, tile=64, warps=8, stages=1),
    "gfx950": PrefillTile(rows=128, tile=64, warps=8, stages=1),
    "fallback": PrefillTile(rows=64, tile=32, warps=4, stages=2),
}


def architecture(device: torch.device) -> str:
    """gfx942, gfx950 or sm90; "fallback" for every other device."""
    name = arch_of(device)
    return name if name in DECODE else "fallback"


def launch_options(tile: DecodeTile | PrefillTile) -> dict[str, Any]:
    """Launch options; fp fusion is pinned: Triton 3.10 changes its default, and with it bits."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
