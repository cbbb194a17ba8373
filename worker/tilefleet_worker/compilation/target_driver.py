"""A driver of Triton for a GPU that is not there: kernels are compiled and never launched."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

ARCHITECTURES = ("gfx942", "gfx950", "sm90")
_NO_LIMIT = 1 << 30


def target_of(arch: str) -> GPUTarget:
    """Triton's target of an architecture."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm")), 32)


class CompilingDriver(DriverBase):  # type: ignore[misc]  # Triton has no types
    """Stands in for the driver of one architecture; see triton.runtime.driver.set_active.

    Each architecture is a device of its own, since Triton remembers the target of a device.
    """

    def __init__(self, arch: str) -> None:
        super().__init__()
        self._target = target_of(arch)
        self._device = ARCHITECTURES.index(arch)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": _NO_LIMIT},
            load_binary=lambda *_: (1, 1, 0, 0, _NO_LIMIT),  # module, function, counts, threads
        )

    @classmethod
    def is_active(cls) -> bool:
        """Never by itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Of a launcher's arguments; there is no launcher."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Number of the device."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        """The only stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Tensors have shapes and types and no memory."""
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        """Nothing runs, so nothing is timed."""
        raise NotImplementedError("kernels are compiled for a GPU that is not there")

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """Launches nothing."""
        return lambda *_: None
