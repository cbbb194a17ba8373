"""From the matrices of a checkpoint to those that kernels read, on the device.

Quantised ones stay so where the kernels can read them: half the bytes of bf16, in memory and in
every step. The others are dequantised here, once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tilefleet_worker.dequantize import Cut, StoredMatrix
from tilefleet_worker.errors import ModelError
from tilefleet_worker.kernels.scaled_matrix import ScaledMatrix, as_fnuz, has_nan
from tilefleet_worker.kernels.weight_tiles import Matrix, why_not
from tilefleet_worker.quant_config import QuantConfig
from tilefleet_worker.weights import Weights

Stored = torch.Tensor | StoredMatrix


def storing(weights: Weights, config: QuantConfig | None) -> Callable[[str, int, int, Cut], Stored]:
    """Reads a matrix as it is stored, or as fp32 where it is stored as floats."""

    def read(name: str, rows: int, columns: int, cut: Cut) -> Stored:
        stored = weights.stored(name, rows, columns, config, cut)
        return weights.take(name, rows, columns, part=cut) if stored is None else stored

    return read


class DeviceMatrices:
    """Makes matrices of one type on one device. fp8: type of its codes there; None: it has none."""

    def __init__(self, dtype: torch.dtype, device: torch.device, fp8: torch.dtype | None) -> None:
        self._dtype = dtype
        self._device = device
        self._fp8 = fp8

    def dense(self, matrix: Stored) -> torch.Tensor:
        """One matrix as floats."""
        values = matrix if isinstance(matrix, torch.Tensor) else matrix.dequantized()
        return values.to(self._dtype).to(self._device)

    def joined(self, *parts: Stored) -> Matrix:
        """Parts with the same columns, one below the other. Raises ModelError on a code of NaN."""
        stored = [part for part in parts if isinstance(part, StoredMatrix)]
        if len(stored) < len(parts) or not self._readable(stored):
            return torch.cat([self.dense(part) for part in parts])
        matrix = _joined(stored).to(self._device)
        if has_nan(matrix):
            raise ModelError(
                f"A quantised matrix {list(matrix.shape)} holds fp8 codes that are no numbers "
                "(0x7F or 0xFF): the checkpoint is damaged."
            )
        return as_fnuz(matrix) if self._is_fnuz(matrix) else matrix

    def stacked(self, matrices: Sequence[Matrix]) -> Matrix:
        """One matrix an expert, all of one shape."""
        plain = [matrix for matrix in matrices if isinstance(matrix, torch.Tensor)]
        scaled = [matrix for matrix in matrices if isinstance(matrix, ScaledMatrix)]
        if not scaled:
            return torch.stack(plain)
        if plain or len({matrix.block for matrix in scaled}) > 1:
            raise ModelError("The experts of a layer must all be quantised alike.")
        values = torch.stack([matrix.values for matrix in scaled])
        scale = torch.stack([matrix.scale for matrix in scaled])
        return replace(scaled[0], values=values, scale=scale)

    def _readable(self, parts: Sequence[StoredMatrix]) -> bool:
        first = parts[0]
        kinds = (torch.int8, torch.float8_e4m3fn if self._fp8 is not None else torch.int8)
        return first.values.dtype in kinds and all(
            part.zero_point is None
            and part.values.dtype == first.values.dtype
            and not why_not(part.block[1], part.values.shape[1])
            for part in parts
        )

    def _is_fnuz(self, matrix: ScaledMatrix) -> bool:
        return self._fp8 == torch.float8_e4m3fnuz and matrix.values.dtype == torch.float8_e4m3fn


def _joined(parts: Sequence[StoredMatrix]) -> ScaledMatrix:
    """One matrix with one height of blocks: theirs where it divides their rows, else 1."""
    heights = {part.block[0] for part in parts}
    height = heights.pop()
    if heights or any(len(part.values) % height for part in parts[:-1]):
        height = 1
    scales = []
    for part in parts:
        repeats = part.block[0] // height
        scale = part.scale if repeats == 1 else part.scale.repeat_interleave(repeats, 0)
        scales.append(scale[: -(-len(part.values) // height)])
    values = torch.cat([part.values.view(torch.uint8) for part in parts])
    return ScaledMatrix(
        values.view(parts[0].values.dtype), torch.cat(scales).contiguous(),
        (height, parts[0].block[1]),
    )  # fmt: skip
