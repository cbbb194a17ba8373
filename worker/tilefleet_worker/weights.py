"""Weights of a model folder: safetensors files, mapped, checked against what the model expects."""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tilefleet_worker.dequantize import WHOLE, Cut, StoredMatrix, block_of, scale_shape
from tilefleet_worker.digests import check_digests
from tilefleet_worker.errors import ModelError
from tilefleet_worker.quant_config import QuantConfig

Progress = Callable[[int, int], None]
"""Called with (bytes taken so far, bytes of all files)."""

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STORED = (torch.float8_e4m3fn, torch.int8)
# Beside a quantised weight; they quantise activations, which stay as they are here.
_UNUSED_SUFFIXES = ("input_scale", "input_zero_point", "activation_scale", "output_scale")


class Weights:
    """All tensors of a folder by name. A context manager: the files are mapped while it is open.

    Raises ModelError on opening when a file is missing, truncated or not safetensors, and when it
    differs from a digest that the folder gives. verify: hash the files; one of a group's processes
    does.
    """

    def __init__(
        self, folder: Path, progress: Progress | None = None, *, verify: bool = True
    ) -> None:
        self._progress = progress
        self._file_of: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}  # safe_open, which has no types
        self._taken: set[str] = set()
        self._bytes_taken = 0
        files = _weight_files(folder)
        for path in files:
            self._open(path)
        self.files_verified = check_digests(folder, files) if verify else 0
        """Files whose SHA-256 the folder gave and that have it."""
        self._bytes_total = sum(path.stat().st_size for path in self._handles)

    def _open(self, path: Path) -> None:
        try:
            handle: Any = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError as error:
            raise ModelError(f"{path}: is missing.") from error
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size if path.exists() else 0
            raise ModelError(
                f"{path}: is not a whole safetensors file ({size} bytes found: {error}). "
                "Download it again."
            ) from error
        self._handles[path] = handle
        for name in handle.keys():  # noqa: SIM118 - not a dict, it cannot be iterated
            self._file_of[name] = path

    def __enter__(self) -> "Weights":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, *shape: int, part: tuple[slice, ...] = ()) -> torch.Tensor:
        """Return a tensor as fp32, of exactly this shape. Raises ModelError when it is not so.

        part: what of each dimension is read and returned; nothing else of the file is touched.
        """
        tensor = self._get(name, shape)
        self._check_shape(name, tensor, shape)
        if tensor.dtype not in _FLOATS:
            hint = " (config.json has no quantization_config)" if tensor.dtype in _STORED else ""
            raise self._wrong(
                name, f"has type {tensor.dtype}, expected one of {_words(_FLOATS)}{hint}"
            )
        return tensor[part].to(torch.float32, copy=True)

    def matrix(
        self,
        name: str,
        rows: int,
        columns: int,
        quantization: QuantConfig | None,
        cut: Cut = WHOLE,
    ) -> torch.Tensor:
        """A matrix [rows, columns], or a part, as fp32; dequantised when it is stored quantised."""
        stored = self.stored(name, rows, columns, quantization, cut)
        if stored is None:
            return self.take(name, rows, columns, part=cut)
        return stored.dequantized()

    def stored(
        self,
        name: str,
        rows: int,
        columns: int,
        quantization: QuantConfig | None,
        cut: Cut = WHOLE,
    ) -> StoredMatrix | None:
        """A quantised matrix, or a part, as it is stored; None when the files hold it as floats.

        name ends in `weight`; its scale is called `weight_scale_inv` or `weight_scale`. Raises
        ModelError when a cut splits a block that has one scale.
        """
        if quantization is None or name not in self:
            return None
        values = self._get(name, (rows, columns))
        if values.dtype in _FLOATS:
            return None
        self._check_shape(name, values, (rows, columns))
        if values.dtype != getattr(torch, quantization.stored):
            raise self._wrong(
                name, f"has type {values.dtype}, but config.json says {quantization.stored}"
            )
        for suffix in _UNUSED_SUFFIXES:
            self.skip(name.removesuffix("weight") + suffix)
        names = [name + "_scale_inv", name + "_scale"]
        scale_name = next((other for other in names if other in self), names[0])
        shape = scale_shape(quantization, rows, columns)
        zero_name = name + "_zero_point"
        whole = StoredMatrix(
            values,
            self._blocks(scale_name, shape).to(torch.float32),
            self._blocks(zero_name, shape) if zero_name in self else None,
            block_of(quantization, rows, columns),
        )
        try:
            return whole.part(cut)
        except ValueError as error:
            raise self._wrong(
                name,
                f"of shape {[rows, columns]} cannot be divided so: {error}, whose weights share "
                "one scale: use a smaller --tensor-parallel-size, or unquantised weights",
            ) from error

    def _blocks(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """Scales or zero points, one a block; a single dimension may be left out."""
        tensor = self._get(name, shape)
        if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
            self._check_shape(name, tensor, shape)
        return tensor.reshape(shape)

    def _get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as it is mapped, counted as used. The shape is for the error alone."""
        path = self._file_of.get(name)
        if path is None:
            files = ", ".join(sorted(file.name for file in self._handles))
            raise ModelError(f"{files}: tensor {name} is missing; expected shape {list(shape)}.")
        tensor: torch.Tensor = self._handles[path].get_tensor(name)
        if name not in self._taken:
            self._taken.add(name)
            self._bytes_taken += tensor.numel() * tensor.element_size()
            if self._progress is not None:
                self._progress(self._bytes_taken, self._bytes_total)
        return tensor

    def _check_shape(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise self._wrong(
                name, f"has shape {list(tensor.shape)}, expected {list(shape)} from config.json"
            )

    def _wrong(self, name: str, what: str) -> ModelError:
        return ModelError(f"{self._file_of[name]}: tensor {name} {what}.")

    def skip(self, name: str) -> None:
        """Count a tensor as used though the model does not need it."""
        self._taken.add(name)

    def skip_parts(self, beginnings: tuple[str, ...]) -> None:
        """Count all tensors whose names begin so as used."""
        self._taken.update(name for name in self._file_of if name.startswith(beginnings))

    def check_all_taken(self) -> None:
        """Raise ModelError when the files hold tensors that the model did not ask for.

        Ignoring them would serve another model than the one in the files.
        """
        left = sorted(name for name in self._file_of if name not in self._taken)
        if left:
            raise ModelError(
                f"{self._file_of[left[0]]}: tensor {left[0]} is not part of the architecture in "
                f"config.json ({len(left)} such tensors)."
            )


def _weight_files(folder: Path) -> list[Path]:
    """Files named by the index, or the single file."""
    index = folder / _INDEX_FILE
    if not index.exists():
        return [folder / _SINGLE_FILE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: is not a safetensors index ({error!r}).") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: names a file outside the folder: {outside[0]!r}.")
    return [folder / name for name in sorted(names)]


def _words(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
