"""Kernels that an image ships, compiled when it was built, put where Triton looks for them.

Triton's cache must be writable, for kernels that were not foreseen, and in a pod it is an empty
volume. So the shipped entries are copied: some megabytes.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def adopt(environment: Mapping[str, str]) -> int:
    """Copy the entries of TILEFLEET_KERNELS that TRITON_CACHE_DIR lacks. Returns how many.

    Nothing when either is unset. Several processes may do it at once: an entry is copied beside
    its place and renamed.
    """
    shipped, cache = environment.get("TILEFLEET_KERNELS"), environment.get("TRITON_CACHE_DIR")
    if not shipped or not cache or not Path(shipped).is_dir():
        return 0
    Path(cache).mkdir(parents=True, exist_ok=True)
    return sum(_copy(entry, Path(cache)) for entry in sorted(Path(shipped).iterdir()))


def _copy(entry: Path, cache: Path) -> bool:
    target = cache / entry.name
    if target.exists():
        return False
    beside = cache / f".{entry.name}.{os.getpid()}"
    shutil.copytree(entry, beside)
    try:
        beside.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(beside)
        return False
    return True
