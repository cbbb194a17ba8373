"""Weights of a model folder: safetensors files, mapped, checked against what the model expects."""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tilefleet_worker.errors import ModelError

Progress = Callable[[int, int], None]
"""Called with (bytes taken so far, bytes of all files)."""

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Weights:
    """All tensors of a folder by name. A context manager: the files are mapped while it is open.

    Raises ModelError on opening when a file is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self._progress = progress
        self._file_of: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}  # safe_open, which has no types
        self._taken: set[str] = set()
        self._bytes_taken = 0
        for path in _weight_files(folder):
            self._open(path)
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

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Return a tensor as fp32, of exactly this shape. Raises ModelError when it is not so."""
        path = self._file_of.get(name)
        if path is None:
            files = ", ".join(sorted(file.name for file in self._handles))
            raise ModelError(f"{files}: tensor {name} is missing; expected shape {list(shape)}.")
        tensor: torch.Tensor = self._handles[path].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)} "
                "from config.json."
            )
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{path}: tensor {name} has type {tensor.dtype}, expected one of "
                f"{', '.join(str(dtype) for dtype in _FLOATS)}."
            )
        self._taken.add(name)
        self._bytes_taken += tensor.numel() * tensor.element_size()
        if self._progress is not None:
            self._progress(self._bytes_taken, self._bytes_total)
        return tensor.to(torch.float32, copy=True)

    def skip(self, name: str) -> None:
        """Count a tensor as used though the model does not need it."""
        self._taken.add(name)

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
