"""Launches the few-row products of a decoder, and owns the scratch memory of their partial sums."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tilefleet_worker.kernels.few_rows import begin_kernel, few_rows_kernel
from tilefleet_worker.kernels.product_tiles import GROUP, ProductTile, ProductTiles, split_part


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream between blocks, as the products read and write it, for some rows."""

    residual: torch.Tensor  # fp32 [rows, hidden]
    scaled: torch.Tensor  # [rows, hidden]: the stream times the next norm's weight
    squares: torch.Tensor  # fp32 [rows, hidden / GROUP]: squares of the stream, by groups

    def rows(self, count: int) -> "Stream":
        """The first rows."""
        return Stream(self.residual[:count], self.scaled[:count], self.squares[:count])

    def select(self, index: torch.Tensor) -> "Stream":
        """Copies of some rows."""
        return Stream(self.residual[index], self.scaled[index], self.squares[index])

    @staticmethod
    def empty(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> "Stream":
        """Memory for so many rows."""
        return Stream(
            torch.empty(rows, hidden, dtype=torch.float32, device=device),
            torch.empty(rows, hidden, dtype=dtype, device=device),
            torch.empty(rows, triton.cdiv(hidden, GROUP), dtype=torch.float32, device=device),
        )


@dataclass(frozen=True, slots=True)
class ProductShape:
    """A matrix of a decoder: output features (of a gated one, of each half), inner dimension."""

    features: int
    inner: int
    gated: bool = False


class Products:
    """Products whose bits of a row do not depend on how many rows there are.

    shapes: all that will be asked for, with up to tiles.max_rows rows. eps: of all norms.
    """

    def __init__(
        self, tiles: ProductTiles, shapes: Iterable[ProductShape], eps: float, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.max_rows = tiles.max_rows
        self._tiles = tiles
        self._eps = eps
        sizes = [_scratch(tiles, shape) for shape in shapes]
        self.scratch_values = max(size for size, _ in sizes)
        self.counter_values = max(count for _, count in sizes)
        self._partial = torch.empty(self.scratch_values, dtype=torch.float32, device=device)
        self._counters = torch.zeros(self.counter_values, dtype=torch.int32, device=device)
        self._compute = compute_type(dtype)

    def begin(self, norm: torch.Tensor, stream: Stream) -> None:
        """Complete a stream whose residual holds the embeddings. norm: weight of the next norm."""
        rows, features = stream.residual.shape
        pad = max(GROUP, triton.next_power_of_2(features))
        begin_kernel[(rows,)](
            stream.residual, norm, stream.scaled, stream.squares,
            FEATURES=features, PAD=pad, GROUP=GROUP, GROUP_LEVELS=_log2(GROUP),
            num_warps=min(8, max(1, pad // 512)), enable_fp_fusion=True,
        )  # fmt: skip

    def normed(
        self, x: Stream, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """out [rows, features] = RMSNorm(x) weightᵀ + bias."""
        operands = Operands(x.scaled, weight, out, x.squares, bias)
        self._launch(operands)
        return out

    def gated(
        self, x: Stream, weight: torch.Tensor, out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """out [rows, features] = silu(RMSNorm(x) gateᵀ) · RMSNorm(x) upᵀ; weight: gate, then up."""
        self._launch(Operands(x.scaled, weight, out, x.squares, gated=True))
        return out

    def add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: torch.Tensor,
        stream: Stream,
    ) -> None:  # fmt: skip
        """stream += x weightᵀ + bias. norm: weight of the norm that comes next."""
        operands = Operands(x, weight, stream.scaled, None, bias, stream, norm)
        self._launch(operands)

    def _launch(self, operands: "Operands") -> None:
        (rows, features), inner = operands.out.shape, operands.x.shape[1]
        tile = self._tiles.of(rows, features, inner, operands.gated)
        launch(tile, operands, self._eps, self._partial, self._counters, self._compute)


@dataclass(frozen=True, slots=True)
class Operands:
    """Tensors of one product; those that do not take part are None."""

    x: torch.Tensor  # [rows, inner]
    weight: torch.Tensor  # [features, inner]; gated: [2 · features, inner]
    out: torch.Tensor  # [rows, features]
    squares: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    stream: Stream | None = None
    norm: torch.Tensor | None = None
    gated: bool = False


def launch(
    tile: ProductTile, operands: Operands, eps: float, partial: torch.Tensor,
    counters: torch.Tensor, compute: tl.dtype,
) -> None:  # fmt: skip
    """One product with a given tile."""
    x, out, stream, squares = operands.x, operands.out, operands.stream, operands.squares
    (rows, features), inner = out.shape, x.shape[1]
    count = 0 if squares is None else triton.next_power_of_2(squares.shape[1])
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(features, tile.columns), tile.splits)

    def given(tensor: torch.Tensor | None) -> torch.Tensor:
        return x if tensor is None else tensor

    weight = operands.weight
    tma = tile.tma and inner % 8 == 0  # rows of a descriptor begin at multiples of 16 bytes
    few_rows_kernel[grid](
        _tiles_of(x, tile.rows, tile.depth) if tma else x,
        _tiles_of(weight, tile.columns, tile.depth) if tma else weight,
        given(operands.bias), given(squares),
        x if stream is None else stream.residual, given(operands.norm), out,
        x if stream is None else stream.squares, partial, counters,
        rows, features, inner, tile.splits, split_part(inner, tile.splits), eps,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, SPLIT=tile.splits > 1,
        GROUP=GROUP, GROUP_LEVELS=_log2(GROUP), SQUARES=count,
        SQUARE_LEVELS=_log2(count) if count else 0,
        PIECE_LEVELS=piece_levels(count, tile.rows, tile.warps), EVEN=inner % tile.depth == 0,
        GATED=operands.gated, RESIDUAL=stream is not None, BIAS=operands.bias is not None,
        TMA=tma, CT=compute, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True, **tile.options,
    )  # fmt: skip


def _tiles_of(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of a matrix whose boxes have so many rows and columns."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])


def _scratch(tiles: ProductTiles, shape: ProductShape) -> tuple[int, int]:
    """Values of partial sums and counters that a product of the most rows takes."""
    most = (1, 1)
    for rows in {*tiles.plain, *tiles.gated, tiles.max_rows}:
        tile = tiles.of(rows, shape.features, shape.inner, shape.gated)
        if tile.splits > 1:
            cells = triton.cdiv(rows, tile.rows) * triton.cdiv(shape.features, tile.columns)
            size = cells * tile.rows * tile.columns * tile.splits * (2 if shape.gated else 1)
            most = max(most[0], size), max(most[1], cells)
    return most


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Operand type of the tensor cores; fp32 in Triton's interpreter, which lacks bf16."""
    if os.environ.get("TRITON_INTERPRET") == "1" or dtype != torch.bfloat16:
        return tl.float32
    return tl.bfloat16


def piece_levels(groups: int, rows: int, warps: int) -> int:
    """log2 of the pieces in which a program of so many rows sums its groups' squares.

    32 a lane beside many sums: more spilled on sm90.
    """
    return _log2(max(1, groups * rows // (1024 * warps))) if rows > 64 else 0


def _log2(power: int) -> int:
    return power.bit_length() - 1


def normed_reference(x: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm from the definition, in fp64."""
    x = x.double()
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * norm.double()
