"""Tile table of the few-row products by architecture, with the evidence beside each entry.

sm90: swept on an H100 with `benchmarks/gpu_products.py --sweep`; figures in
docs/design/few-row-products.md. Bits depend on the splits alone there: tiles of other columns, rows
and depth, with mma.sync or wgmma, with and without TMA, gave the same ones in 216 comparisons.
What bounds more than 64 rows is not memory but what programs read from the L2 cache, the less the
larger their tiles; but tiles so large that multiprocessors stay idle lose more. gfx942,
gfx950: chosen by compile reports, not measured; one tile and one matrix instruction for all rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GROUP = 32
"""Features of a group whose squares are summed together; every tile that adds has whole groups."""
UNIT = 256
"""Inner elements of a split are a multiple of it; every depth divides it."""


@dataclass(frozen=True)
class ProductTile:
    """rows, columns: rows and output features of a program. depth: inner elements of a loop step.

    splits: programs that share the inner dimension. tma: tiles come through TMA descriptors. least:
    programs that a product must give to be taken this way, where the table has a smaller tile.
    """

    rows: int
    columns: int
    depth: int
    splits: int
    warps: int
    stages: int
    options: Mapping[str, int] = field(default_factory=dict, hash=False)
    tma: bool = False
    least: int = 0


@dataclass(frozen=True)
class ProductTiles:
    """Of an architecture. Tiles: by the most rows that one takes, ascending, of a gated product and
    of others; the first of several that has its `least` programs. They say nothing of splits.

    strip, programs, longest: an inner dimension is halved while programs of `strip` columns are no
    more than half of `programs`, or while it is longer than `longest`.
    """

    plain: Mapping[int, tuple[ProductTile, ...]]
    gated: Mapping[int, tuple[ProductTile, ...]]
    programs: int
    longest: int
    max_rows: int
    """Above, the library's products take over."""
    fast_rows: int
    """Likewise where rows need not have the same bits in every batch: measured, where known."""
    strip: int = 64

    def of(self, rows: int, features: int, inner: int, gated: bool = False) -> ProductTile:
        """Tile of a product. Splits depend on the matrix alone."""
        tiles, splits = self.gated if gated else self.plain, self.splits(features, inner)
        most = next((most for most in tiles if most >= rows), max(tiles))
        found = [
            tile for tile in tiles[most]
            if -(-most // tile.rows) * -(-features // tile.columns) * splits >= tile.least
        ]  # fmt: skip
        return replace(found[0], splits=splits)

    def splits(self, features: int, inner: int) -> int:
        """Parts of the inner dimension that are summed apart, in order."""
        strips, splits = -(-features // self.strip), 1
        while inner // splits >= 2 * UNIT and (
            strips * splits * 2 <= self.programs or inner // splits > self.longest
        ):
            splits *= 2
        return splits


def split_part(inner: int, splits: int) -> int:
    """Inner elements of a split; the last ones may have fewer, or none."""
    return -(-inner // (UNIT * splits)) * UNIT


def _same(
    stages: Mapping[int, int], columns: int, depth: int, warps: int, options: Mapping[str, int]
) -> dict[int, tuple[ProductTile, ...]]:
    """Tiles that differ in rows and stages alone."""
    return {
        rows: (ProductTile(rows, columns, depth, 1, warps, count, options),)
        for rows, count in stages.items()
    }


_MFMA = {"matrix_instr_nonkdim": 16}  # for every number of rows: another one sums in another order
_CDNA = _same({16: 2, 64: 2}, 32, 128, 4, _MFMA)
_FALLBACK = _same({16: 2, 64: 2}, 32, 64, 4, {})
# A program of Triton's interpreter takes milliseconds, whatever its size: few large ones.
_INTERPRETER = _same({16: 1}, 256, 256, 4, {})
TILES: dict[str, ProductTiles] = {
    "sm90": ProductTiles(
        plain={
            16: (ProductTile(16, 64, 128, 1, 4, 5),),
            32: (ProductTile(32, 64, 128, 1, 4, 4),),
            64: (
                ProductTile(64, 64, 128, 1, 4, 3, least=264),
                ProductTile(64, 64, 128, 1, 4, 4, tma=True),
            ),
            128: (
                ProductTile(128, 128, 64, 1, 8, 6, tma=True, least=112),
                ProductTile(128, 64, 128, 1, 8, 4, tma=True),
            ),
            256: (
                ProductTile(256, 128, 64, 1, 8, 4, tma=True, least=132),
                ProductTile(128, 128, 64, 1, 8, 6, tma=True, least=112),
                ProductTile(256, 64, 64, 1, 8, 5, tma=True, least=96),
                ProductTile(128, 64, 128, 1, 4, 4, tma=True),
            ),
        },
        gated={
            16: (ProductTile(16, 64, 128, 1, 4, 4),),
            32: (ProductTile(32, 64, 128, 1, 4, 3),),
            64: (ProductTile(64, 64, 128, 1, 4, 3),),
            256: (
                ProductTile(128, 128, 64, 1, 8, 4, least=132),
                ProductTile(128, 64, 128, 1, 8, 3, tma=True),
            ),
        },
        programs=64, longest=8192, max_rows=256, fast_rows=32,
    ),
    "gfx942": ProductTiles(
        _CDNA, _CDNA, programs=608, longest=2048, max_rows=64, fast_rows=64, strip=32
    ),
    "gfx950": ProductTiles(
        _CDNA, _CDNA, programs=512, longest=2048, max_rows=64, fast_rows=64, strip=32
    ),
    "fallback": ProductTiles(
        _FALLBACK, _FALLBACK, programs=128, longest=4096, max_rows=64, fast_rows=64, strip=32
    ),
    "interpreter": ProductTiles(
        _INTERPRETER, _INTERPRETER, programs=4, longest=512, max_rows=16, fast_rows=16, strip=256
    ),
}  # fmt: skip
