"""Karpenter with its kwok provider: a real node autoscaler, whose nodes are fake.

Not part of the base cluster: built on first use, into a folder of its own that only its own
version names, so that the base programs need no new build. It runs in the foreground, in the
cluster's network, as the cluster's administrator.
"""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from kit import gobuild
from kit.catalog import GO_SOURCES, Binary, GoBuild
from kit.errors import BuildFailed
from kit.layout import Layout
from kit.processes import run
from kit.progress import Progress

MODULE = GO_SOURCES.parent / "karpenter"
PACKAGE = "sigs.k8s.io/karpenter"
BUILD = GoBuild("../karpenter", f"{PACKAGE}/kwok", minutes=3.5)
BINARY = Binary("karpenter-kwok", BUILD)
METRICS_PORT, HEALTH_PORT = 18080, 18081


def folder(layout: Layout) -> Path:
    """Where this version of it is kept."""
    digest = hashlib.sha256(repr(BUILD).encode())
    for name in ("go.mod", "go.sum"):
        digest.update((MODULE / name).read_bytes())
    return layout.cache / f"karpenter-{digest.hexdigest()[:12]}"


def ensure(layout: Layout, progress: Progress) -> Path:
    """The folder with the program and `crds/`, built where it is not there.

    Raises MissingTool or BuildFailed.
    """
    place = folder(layout)
    place.mkdir(parents=True, exist_ok=True)
    with (place / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = place / BINARY.name
        if not program.exists():
            gobuild.require_go()
            gobuild.require_disk_space(place)
            gobuild.build(BINARY, BUILD, program, "[1/1]", progress)
        _copy_definitions(place / "crds")
    return place


def _copy_definitions(target: Path) -> None:
    if target.is_dir():
        return
    found = run(["go", "list", "-C", MODULE, "-m", "-f", "{{.Dir}}", PACKAGE]).split()
    if not found:
        raise BuildFailed(f"go names no folder for {PACKAGE}")
    module = Path(found[-1])
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir()
    for source in ("pkg/apis/crds", "kwok/apis/crds"):
        for path in sorted((module / source).glob("*.yaml")):
            shutil.copyfile(path, temporary / path.name)
    temporary.rename(target)


def command(place: Path) -> list[str]:
    """Its command line. Pure."""
    ports = [f"--metrics-port={METRICS_PORT}", f"--health-probe-port={HEALTH_PORT}"]
    return [str(place / BINARY.name), *ports, "--disable-leader-election=true"]


def environment(instance_types: Path) -> dict[str, str]:
    """What it reads beside KUBECONFIG: the offers of the cloud that it plays. Pure."""
    return {
        "INSTANCE_TYPES_FILE_PATH": str(instance_types.absolute()),
        "SYSTEM_NAMESPACE": "kube-system",
    }
