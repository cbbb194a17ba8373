"""Mixtures of experts and weights of one byte on a GPU's path: no GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.interpreter import check_in_interpreter
from tilefleet_worker.dequantize import StoredMatrix
from tilefleet_worker.device_matrices import DeviceMatrices
from tilefleet_worker.errors import ModelError
from tilefleet_worker.kernels.routing import num_blocks
from tilefleet_worker.kernels.scaled_matrix import ScaledMatrix, as_fnuz, has_nan
from tilefleet_worker.target import fp8_type

CPU = torch.device("cpu")
OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
EVERY_CODE = torch.arange(256, dtype=torch.uint8)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("kind", ["kernels", "model"])
def test_experts_and_stored_weights_match_their_references(kind: str) -> None:
    check_in_interpreter("expert_cases.py", kind, timeout_seconds=900)


def test_all_254_ocp_numbers_keep_their_value_in_fnuz_codes() -> None:
    values = EVERY_CODE.view(OCP)
    number = ~values.float().isnan()
    matrix = ScaledMatrix(values[number].view(2, -1), torch.tensor([[0.5], [3.0]]), (1, 127))
    turned = as_fnuz(matrix)
    assert turned.values.dtype == FNUZ
    assert number.sum() == 254
    assert turned.dequantized().equal(matrix.dequantized())
    assert not turned.values.float().isnan().any()


def test_the_two_codes_that_are_no_numbers_are_found() -> None:
    found = []
    for code in range(256):
        values = torch.full((2, 16), 0x80, dtype=torch.uint8)
        values[1, 3] = code
        if has_nan(ScaledMatrix(values.view(OCP), torch.ones(1, 1), (2, 16))):
            found.append(code)
    assert found == [0x7F, 0xFF]


@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=40), rows=st.sampled_from((16, 64)))
def test_blocks_suffice_for_any_choice_and_are_not_one_too_many(
    counts: list[int], rows: int
) -> None:
    pairs, experts = sum(counts), len(counts)
    assert sum(-(-count // rows) for count in counts) <= num_blocks(pairs, experts, rows)
    if pairs:  # the worst choice: one pair each, all others with one expert
        used = min(pairs, experts)
        worst = used - 1 + -(-(pairs - used + 1) // rows)
        assert num_blocks(pairs, experts, rows) == worst


def stored(rows: int, columns: int, block: tuple[int, int]) -> StoredMatrix:
    blocks = -(-rows // block[0]), -(-columns // block[1])
    values = torch.randn(rows, columns).mul_(50).to(OCP)
    return StoredMatrix(values, torch.rand(blocks) + 0.5, None, block)


@pytest.mark.parametrize(
    ("rows", "block", "height"),
    [
        ((64, 32, 40), (32, 32), 32),  # the last one may be cut
        ((64, 40, 32), (32, 32), 1),
        ((64, 32), (1, 64), 1),
        ((64,), (128, 128), 128),
    ],
)
@pytest.mark.parametrize("fp8", [OCP, FNUZ])
def test_joined_matrices_stay_stored_and_keep_their_values(
    rows: tuple[int, ...], block: tuple[int, int], height: int, fp8: torch.dtype
) -> None:
    parts = [stored(count, 64, block) for count in rows]
    joined = DeviceMatrices(torch.bfloat16, CPU, fp8).joined(*parts)
    assert isinstance(joined, ScaledMatrix)
    assert (joined.values.dtype, joined.block[0]) == (fp8, height)
    assert joined.dequantized().equal(torch.cat([part.dequantized() for part in parts]))


def test_per_tensor_scales_of_joined_matrices_are_kept_apart() -> None:
    parts = [stored(48, 64, (48, 64)), stored(16, 64, (16, 64))]
    joined = DeviceMatrices(torch.bfloat16, CPU, OCP).joined(*parts)
    assert isinstance(joined, ScaledMatrix)
    assert joined.dequantized().equal(torch.cat([part.dequantized() for part in parts]))


def test_what_the_kernels_cannot_read_is_dequantised() -> None:
    made = DeviceMatrices(torch.float32, CPU, None)
    part = stored(32, 64, (32, 32))
    for parts, matrices in (
        ([part], made),  # a GPU that decodes no fp8
        ([stored(32, 64, (32, 24))], DeviceMatrices(torch.float32, CPU, OCP)),
        ([part, torch.randn(8, 64)], DeviceMatrices(torch.float32, CPU, OCP)),
    ):
        joined = matrices.joined(*parts)
        assert isinstance(joined, torch.Tensor)
        dense = [p if isinstance(p, torch.Tensor) else p.dequantized() for p in parts]
        assert joined.equal(torch.cat(dense))


def test_a_damaged_checkpoint_is_refused() -> None:
    part = stored(32, 64, (32, 32))
    part.values.view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(ModelError, match=r"\[32, 64\] holds fp8 codes that are no numbers"):
        DeviceMatrices(torch.bfloat16, CPU, OCP).joined(part)


def test_experts_that_are_quantised_differently_are_refused() -> None:
    made = DeviceMatrices(torch.bfloat16, CPU, OCP)
    matrices = [made.joined(stored(32, 64, (32, 32))), made.joined(torch.randn(32, 64))]
    with pytest.raises(ModelError, match="quantised alike"):
        made.stacked(matrices)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("gfx942", FNUZ), ("gfx950", OCP), ("gfx90a", None), ("sm90", OCP), ("sm89", OCP),
     ("sm80", None), ("sm100", OCP), ("none", OCP)],
)  # fmt: skip
def test_each_architecture_has_its_kind_of_fp8(arch: str, kind: torch.dtype | None) -> None:
    assert fp8_type(arch) == kind
