"""Builds one binary from the pinned Go modules: resumable, never half-written, with progress."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from kit.catalog import GO_SOURCES, KWOK, KWOK_STAGES, Binary, GoBuild
from kit.errors import BuildFailed, MissingTool
from kit.processes import run, run_watched
from kit.progress import Progress, clock

NEEDED_GO = (1, 26)
GIB = 1 << 30
# Measured on a cold machine: module cache 3 GB, build cache 5.3 GB, binaries 0.6 GB.
NEEDED_BYTES = {"GOMODCACHE": 3 * GIB, "GOCACHE": 6 * GIB}
BINARIES_BYTES = 1 * GIB


def require_go() -> None:
    """Raises MissingTool unless a Go of at least NEEDED_GO is on PATH."""
    found = shutil.which("go")
    wanted = ".".join(map(str, NEEDED_GO))
    if found is None:
        raise MissingTool(
            f"the cluster's binaries are built with Go >= {wanted}, and there is no `go` on PATH: "
            "install it from https://go.dev/dl/, or set KUBEBUILDER_ASSETS to a folder with them"
        )
    version = re.search(r"go(\d+)\.(\d+)", run([found, "version"]))
    if version is None or tuple(map(int, version.groups())) < NEEDED_GO:
        raise MissingTool(f"{found} is older than Go {wanted}: install it from https://go.dev/dl/")


def require_disk_space(kit: Path) -> None:
    """Raises MissingTool, naming what needs how much, where a file system is too full to build."""
    wanted: dict[int, list[tuple[str, Path, int]]] = {}
    names = ["GOMODCACHE", "GOCACHE"]
    folders = [Path(line) for line in run(["go", "env", *names]).split("\n") if line]
    rows = [(n, f, NEEDED_BYTES[n]) for n, f in zip(names, folders, strict=True)]
    for name, folder, size in [*rows, ("the binaries", kit, BINARIES_BYTES)]:
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        used = _size_upto(folder, size) if name in NEEDED_BYTES else 0
        wanted.setdefault(existing.stat().st_dev, []).append((name, existing, size - used))
    for parts in wanted.values():
        needed = sum(size for _, _, size in parts)
        free = shutil.disk_usage(parts[0][1]).free
        if free < needed:
            detail = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, _, size in parts)
            raise MissingTool(
                f"building the cluster's binaries needs {needed / GIB:.1f} GiB ({detail}) on the "
                f"file system of {parts[0][1]}, {free / GIB:.1f} GiB are free: free "
                f"{(needed - free) / GIB:.1f} GiB more"
            )


def _size_upto(folder: Path, limit: int) -> int:
    """Bytes a cache holds, counted no further than the limit: a warm cache needs no space."""
    total = 0
    for root, _, files in os.walk(folder):
        total += sum(os.lstat(os.path.join(root, name)).st_size for name in files)
        if total >= limit:
            return limit
    return total


def build(binary: Binary, source: GoBuild, target: Path, position: str, progress: Progress) -> None:
    """Build a binary into target by a temporary name and a rename.

    Raises BuildFailed with the end of the compiler's output.
    """
    log = target.with_name(f".{binary.name}.log")
    temporary = target.with_name(f".{binary.name}.{os.getpid()}")
    command: list[str | Path] = ["go", "build", "-trimpath", "-ldflags", source.linker_flags]
    command += ["-o", temporary, source.package]
    expected = f"a cold build takes about {source.minutes:g} min"
    progress.say(f"{position} building {binary.name}; {expected}")
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
    tick = _ticker(f"{position} building {binary.name}", progress)
    try:
        status = run_watched(command, GO_SOURCES / source.module, environment, log, tick)
        if status != 0:
            raise BuildFailed(f"building {binary.name} failed:\n{log.read_text()[-2000:]}")
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


def _ticker(text: str, progress: Progress) -> Callable[[float], None]:
    said_at = 0.0

    def tick(seconds: float) -> None:
        nonlocal said_at
        if seconds - said_at >= 20:
            said_at = seconds
            progress.say(f"{text}: {clock(seconds)} so far")

    return tick


def copy_kwok_stages(target: Path) -> None:
    """Copy the stage files out of the kwok module, so that running needs no Go."""
    if target.is_dir():
        return
    module = "sigs.k8s.io/kwok"
    command: list[str | Path] = [
        "go",
        "list",
        "-C",
        GO_SOURCES / "kwok",
        "-m",
        "-f",
        "{{.Dir}}",
        module,
    ]
    try:
        folder = Path(run(command).strip().splitlines()[-1])
    except IndexError:
        raise BuildFailed(f"go names no folder for {module}@v{KWOK}") from None
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    for stage in KWOK_STAGES:
        shutil.copyfile(folder / "kustomize" / "stage" / stage, temporary / Path(stage).name)
    temporary.rename(target)
