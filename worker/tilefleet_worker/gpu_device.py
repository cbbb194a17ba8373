"""The GPU of this process: found or refused with a remedy, and described for /stats."""

import os
from importlib.util import find_spec
from typing import Any

import torch

from tilefleet_worker.errors import ConfigError


def available() -> bool:
    """Whether torch sees a GPU: CUDA, or ROCm by the same name."""
    return torch.cuda.is_available()


def require(rank: int = 0, ranks: int = 1) -> torch.device:
    """The device of backend triton. Raises ConfigError when the GPU or Triton is missing.

    rank: of the process among the `ranks` that share a model; each takes the GPU of its number. In
    Triton's interpreter, which is for tests, the CPU stands in for a GPU.
    """
    if find_spec("triton") is None:
        raise ConfigError(
            "--backend triton needs the package triton, which is not installed: use the worker's "
            "GPU image, or --backend cpu."
        )
    if available():
        found = torch.cuda.device_count()
        if found < ranks:
            raise ConfigError(
                f"--tensor-parallel-size is {ranks}, but this process sees {found} GPUs: request "
                "as many for the pod, or lower it."
            )
        if ranks > 1:
            torch.cuda.set_device(rank)
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    raise ConfigError(
        f"--backend triton needs a GPU, and torch {torch.__version__} ({_build()}) sees none: "
        "check that the pod requests one and that the image is built for it, or use --backend cpu."
    )


def _build() -> str:
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"


def facts(device: torch.device) -> dict[str, Any]:
    """The device as `/stats` reports it. arch: gfx942, gfx950, … or sm90."""
    if device.type != "cuda":
        return {"kind": "cpu", "name": "Triton interpreter", "arch": "none", "memory_bytes": 0}
    properties = torch.cuda.get_device_properties(device)
    from tilefleet_worker.target import arch_of  # imports Triton, which a CPU's worker may lack

    return {
        "kind": "gpu",
        "name": properties.name,
        "arch": arch_of(device),
        "memory_bytes": properties.total_memory,
        "compute_units": properties.multi_processor_count,
        "runtime": _build().removeprefix("built for "),
    }
