"""Fused kernels and the GPU's runner in Triton's interpreter: no GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.worker.interpreter import check_in_interpreter
from tilefleet_worker.attention.triton.prefill import query_tiles
from tilefleet_worker.graphs import padded_sizes
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.step import StepPlan, StepRow
from tilefleet_worker.step_arrays import lay_out
from tilefleet_worker.step_inputs import InputBuffer, Staging, StepTooLargeError

PARAMS = SamplingParams(max_tokens=1, temperature=0.0)
SLOTS = torch.zeros(8, dtype=torch.int32)


@pytest.mark.parametrize("kind", ["kernels", "runner", "windowed", "engine", "ahead"])
def test_fused_kernels_and_runner_match_their_references(kind: str) -> None:
    check_in_interpreter("fused_kernel_cases.py", kind)


def test_tokens_chosen_on_the_device_are_those_of_the_host() -> None:
    check_in_interpreter("sampling_cases.py")


def row(name: str, start: int, tokens: tuple[int, ...], blocks: tuple[int, ...]) -> StepRow:
    return StepRow(name, start, tokens, blocks, name != "unsampled", PARAMS, 0)


def test_a_plan_is_laid_out_with_decodes_first() -> None:
    plan = StepPlan.of(
        (
            row("chunk", 3, (10, 11, 12), (5, 6)),
            row("decode", 6, (20,), (7, 2)),
            row("unsampled", 0, (30, 31), (9,)),
        )
    )
    arrays = lay_out(plan, 4)
    assert arrays.order is not None
    assert arrays.order.tolist() == [1, 0, 2]
    assert (arrays.num_decodes, arrays.decode_only) == (1, False)
    assert arrays.token_ids.tolist() == [20, 10, 11, 12, 30, 31]
    assert arrays.positions.tolist() == [6, 3, 4, 5, 0, 1]
    assert arrays.slots.tolist() == [10, 23, 24, 25, 36, 37]
    assert arrays.context_lens.tolist() == [7, 6, 2]
    assert arrays.logits_index is not None
    assert arrays.logits_index.tolist() == [0, 3]


def test_plain_decodes_are_laid_out_from_the_table() -> None:
    rows = tuple(row(str(i), 4 + i, (20 + i,), (7, 2 + i)) for i in range(3))
    arrays = lay_out(StepPlan.of(rows), 4)
    assert (arrays.order, arrays.num_decodes, arrays.logits_index) == (None, 3, None)
    assert arrays.token_ids.tolist() == [20, 21, 22]
    assert arrays.positions.tolist() == [4, 5, 6]
    assert arrays.slots.tolist() == [8, 13, 18]
    assert arrays.context_lens.tolist() == [5, 6, 7]
    assert arrays.block_table.tolist() == [[7, 2], [7, 3], [7, 4]]


def test_a_row_beyond_its_blocks_is_refused() -> None:
    with pytest.raises(IndexError, match="beyond its blocks"):
        lay_out(StepPlan.of((row("a", 3, (1, 2), (5,)),)), 4)


def test_inputs_of_one_padded_size_stay_in_one_place_and_hide_the_padding() -> None:
    buffer = InputBuffer(64, 8, 4, 16, SLOTS)
    first = buffer.decode(lay_out(StepPlan.of((row("a", 5, (42,), (3, 1)),)), 4), 4)
    assert first.token_ids.tolist() == [42, 0, 0, 0]
    assert first.slots.tolist() == [5, -1, -1, -1]
    assert first.paged.context_lens.tolist() == [6, 0, 0, 0]
    assert first.paged.block_table[0, :2].tolist() == [3, 1]
    rows = tuple(row(str(i), i, (i,), (i + 1, 9)) for i in range(4))
    again = buffer.decode(lay_out(StepPlan.of(rows), 4), 4)
    assert again.token_ids.data_ptr() == first.token_ids.data_ptr()
    assert again.paged.block_table.data_ptr() == first.paged.block_table.data_ptr()
    assert again.paged.context_lens.tolist() == [1, 2, 3, 4]


def test_a_step_never_fills_the_host_buffer_that_the_step_before_may_still_be_sent_from() -> None:
    staging = Staging(8, torch.device("cpu"))
    first = staging.host()
    first[:4] = 1
    sent = staging.send([slice(0, 4)])[0]
    second = staging.host()
    assert not np.shares_memory(first, second)
    second[:4] = 2
    assert sent.tolist() == [1, 1, 1, 1]
    assert staging.send([slice(0, 4)])[0].tolist() == [2, 2, 2, 2]
    assert np.shares_memory(staging.host(), first)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ((row("a", 0, tuple(range(9)), (1, 2, 3)),), "9 tokens.*built for 8"),
        ((row("a", 16, (1,), (1, 2, 3, 4, 5)),), "5 blocks of a request.*built for 4"),
        (tuple(row(str(i), 0, (1,), (i,)) for i in range(4)), "4 rows.*built for 3"),
    ],
)
def test_a_step_larger_than_the_buffer_is_refused(step: tuple[StepRow, ...], said: str) -> None:
    arrays = lay_out(StepPlan.of(step), 4)
    buffer = InputBuffer(8, 3, 4, 16, SLOTS)
    with pytest.raises(StepTooLargeError, match=said):
        buffer.mixed(arrays)
    if arrays.decode_only:
        with pytest.raises(StepTooLargeError, match=said):
            buffer.decode(arrays, arrays.num_rows)


@pytest.mark.parametrize("scored", [False, True])
def test_the_largest_step_fits_the_buffer(scored: bool) -> None:
    rows = tuple(
        row(str(i), 0, tuple(range(n)), (4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3))
        for i, n in enumerate((11, 1, 4))
    )
    if scored:
        rows = tuple(replace(one, targets=one.token_ids[1:]) for one in rows)
    inputs = InputBuffer(16, 3, 4, 4, SLOTS).mixed(lay_out(StepPlan.of(rows), 4))
    assert inputs.logits_index is not None
    assert len(inputs.logits_index) == (16 if scored else 3)
    assert inputs.paged.tiles is not None
    assert len(inputs.paged.tiles) == 4


def test_tiles_cover_every_query_once_longest_context_first() -> None:
    tiles = query_tiles(np.array([0, 5, 0, 33]), np.array([9, 5, 7, 40]), 16, first_row=2)
    assert tiles.dtype == np.int32
    covered = sorted((int(r0) + i, int(s), int(p) + i) for s, r0, n, p in tiles for i in range(n))
    assert covered == [
        *((2 + i, 1, i) for i in range(5)),
        *((7 + i, 3, 7 + i) for i in range(33)),
    ]
    assert (np.diff(tiles[:, 3]) <= 0).all()


@pytest.mark.parametrize("most", [1, 3, 8, 64, 200, 256])
def test_padded_sizes_ascend_to_the_limit(most: int) -> None:
    sizes = padded_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
