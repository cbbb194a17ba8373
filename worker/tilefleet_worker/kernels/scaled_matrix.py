"""Matrices of one byte a weight with a scale for each block, as kernels read them.

Codes of e4m3 come in two kinds: OCP (e4m3fn), which checkpoints, sm90 and gfx950 have, and FNUZ,
the only one that gfx942 decodes. The same bits stand for half the value in FNUZ, but for three
codes.
"""

from dataclasses import dataclass, replace

import torch

_NEGATIVE_ZERO = 0x80  # NaN in FNUZ
_NAN_CODES = (0x7F, 0xFF)  # of OCP


@dataclass(frozen=True, slots=True)
class ScaledMatrix:
    """value = stored · scale of its block. Leading dimensions: one matrix an expert, or none."""

    values: torch.Tensor  # float8_e4m3fn, float8_e4m3fnuz or int8 [..., rows, columns]
    scale: torch.Tensor  # fp32 [..., row blocks, column blocks]
    block: tuple[int, int]  # rows and columns of a block

    @property
    def shape(self) -> torch.Size:
        """Of the matrix, as a plain tensor has it."""
        return self.values.shape

    def dequantized(self) -> torch.Tensor:
        """The values in fp32, each rounded once at most."""
        height, width = self.block
        rows, columns = self.shape[-2:]
        spread = self.scale.repeat_interleave(height, -2)[..., :rows, :]
        spread = spread.repeat_interleave(width, -1)[..., :columns]
        return self.values.float() * spread

    def to(self, device: torch.device) -> "ScaledMatrix":
        """The same on a device."""
        return replace(self, values=self.values.to(device), scale=self.scale.to(device))


def as_fnuz(matrix: ScaledMatrix) -> ScaledMatrix:
    """An OCP matrix in FNUZ codes: bits kept, scales doubled, -0 as 0. Exact for all 254 numbers.

    The scale is doubled, not the code: values from 256 on have no FNUZ code. Call it after
    `has_nan` said no: OCP's two NaN codes are ±240 in FNUZ.
    """
    codes = matrix.values.view(torch.uint8)
    codes = torch.where(codes == _NEGATIVE_ZERO, torch.zeros_like(codes), codes)
    return replace(matrix, values=codes.view(torch.float8_e4m3fnuz), scale=matrix.scale * 2)


def has_nan(matrix: ScaledMatrix) -> bool:
    """Whether an OCP matrix holds a code that is no number. Waits for the device; meta has none."""
    if matrix.values.dtype != torch.float8_e4m3fn or matrix.values.is_meta:
        return False
    codes = matrix.values.view(torch.uint8)
    return any(bool((codes == code).any()) for code in _NAN_CODES)
