"""Few-row products: values, launches of a layer and what their tile table promises. No GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.interpreter import check_in_interpreter
from tilefleet_worker.kernels.product_tiles import GROUP, TILES, UNIT, split_part
from tilefleet_worker.kernels.products import Products, ProductShape

features = st.integers(1, 20_000)


@pytest.mark.parametrize("kind", ["products", "launches"])
def test_few_row_products_match_fp64_and_a_layer_has_few_launches(kind: str) -> None:
    check_in_interpreter("few_rows_cases.py", kind)


@given(st.sampled_from(sorted(TILES)), features, features, st.integers(1, 256), st.booleans())
def test_what_decides_a_rows_bits_does_not_depend_on_the_number_of_rows(
    arch: str, outputs: int, inner: int, rows: int, gated: bool
) -> None:
    tiles = TILES[arch]
    tile = tiles.of(rows, outputs, inner, gated)
    assert tile.splits == tiles.of(1, outputs, inner, gated).splits == tiles.splits(outputs, inner)
    assert tile.splits == 1 or inner // tile.splits >= UNIT
    part = split_part(inner, tile.splits)
    assert part * tile.splits >= inner > part * tile.splits - UNIT * tile.splits
    assert part % tile.depth == UNIT % tile.depth == 0
    assert tile.columns % GROUP == 0
    if arch.startswith("gfx"):  # where other tiles were not measured to give the same bits
        alone = tiles.of(1, outputs, inner, not gated)
        assert replace(tile, rows=0, stages=0) == replace(alone, rows=0, stages=0)


@given(st.sampled_from(sorted(TILES)), features, st.integers(1, 20_000), st.booleans(), st.data())
def test_scratch_memory_holds_the_partial_sums_of_every_number_of_rows(
    arch: str, outputs: int, inner: int, gated: bool, data: st.DataObject
) -> None:
    tiles = TILES[arch]
    rows = data.draw(st.integers(1, tiles.max_rows))
    made = Products(
        tiles, [ProductShape(outputs, inner, gated)], 1e-6, torch.float32, torch.device("meta")
    )
    tile = tiles.of(rows, outputs, inner, gated)
    cells = -(-rows // tile.rows) * -(-outputs // tile.columns)
    if tile.splits > 1:
        values = cells * tile.splits * tile.rows * tile.columns * (1 + gated)
        assert made.scratch_values >= values
        assert made.counter_values >= cells
