"""The weights of a model that is known by its config alone: shapes and types, no bytes."""

import torch

from tilefleet_worker.dequantize import WHOLE, Cut, StoredMatrix, block_of, scale_shape
from tilefleet_worker.quant_config import QuantConfig
from tilefleet_worker.weights import Weights

META = torch.device("meta")


class ShapeWeights(Weights):
    """Has whatever tensor it is asked for, on the device meta, stored as the config says."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._file_of = {}

    def __contains__(self, name: str) -> bool:
        return True

    def take(self, name: str, *shape: int, part: tuple[slice, ...] = ()) -> torch.Tensor:
        """See Weights.take."""
        return torch.empty(shape, dtype=torch.float32, device=META)[part]

    def stored(
        self,
        name: str,
        rows: int,
        columns: int,
        quantization: QuantConfig | None,
        cut: Cut = WHOLE,
    ) -> StoredMatrix | None:
        """See Weights.stored. Routers and the head are published as floats."""
        if quantization is None or ("proj" not in name and "experts" not in name):
            return None
        kind = getattr(torch, quantization.stored)
        values = torch.empty(rows, columns, dtype=kind, device=META)
        scale = torch.empty(scale_shape(quantization, rows, columns), device=META)
        whole = StoredMatrix(values, scale, None, block_of(quantization, rows, columns))
        return whole.part(cut)
