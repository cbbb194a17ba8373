"""Stored matrices and their values: one byte a weight, and a scale for each block of it."""

from dataclasses import dataclass

import torch

from tilefleet_worker.quant_config import QuantConfig

Cut = tuple[slice, slice]
"""Rows and columns that are read of a matrix."""
WHOLE: Cut = (slice(None), slice(None))


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A quantised matrix as the checkpoint has it, for kernels that compute on its bytes."""

    values: torch.Tensor  # float8_e4m3fn or int8 [rows, columns]
    scale: torch.Tensor  # fp32 [row blocks, column blocks]
    zero_point: torch.Tensor | None  # of the scale's shape; None: 0
    block: tuple[int, int]  # rows and columns of a block

    def dequantized(self) -> torch.Tensor:
        """(stored - zero point) · scale in fp32, [rows, columns].

        Exact for e4m3 and int8 when the scale is a power of two, else rounded once.
        """
        values = self.values.to(torch.float32)
        if self.zero_point is not None:
            values -= self._spread(self.zero_point.to(torch.float32))
        return values.mul_(self._spread(self.scale))

    def part(self, cut: Cut) -> "StoredMatrix":
        """Some rows and columns with their scales. Raises ValueError when a cut splits a block."""
        blocks = []
        for size, step, count, wanted in zip(
            self.values.shape, self.block, self.scale.shape, cut, strict=True
        ):
            start, stop, _ = wanted.indices(size)
            if count > 1 and (start % step or (stop % step and stop != size)):
                raise ValueError(f"a cut at {start} or {stop} splits a block of {step}")
            blocks.append(slice(None) if count == 1 else slice(start // step, -(-stop // step)))
        where = tuple(blocks)
        zero_point = None if self.zero_point is None else self.zero_point[where]
        return StoredMatrix(self.values[cut], self.scale[where], zero_point, self.block)

    def _spread(self, small: torch.Tensor) -> torch.Tensor:
        """One value a block → one a weight. Whole rows or columns are left to broadcasting."""
        for dimension, size in enumerate(self.block):
            if small.shape[dimension] > 1:
                small = small.repeat_interleave(size, dimension)
        rows, columns = self.values.shape
        return small[:rows, :columns]


def scale_shape(config: QuantConfig, rows: int, columns: int) -> tuple[int, int]:
    """Scales of a matrix: how many blocks it has down and across, the last ones perhaps cut."""
    height, width = block_of(config, rows, columns)
    return -(-rows // height), -(-columns // width)


def block_of(config: QuantConfig, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of one block, with 0 resolved to all of them."""
    height, width = config.block
    return height or rows, width or columns
