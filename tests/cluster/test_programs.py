"""Where the cluster's programs come from: look-up order, versions, resumable builds, disk space."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from kit import binaries, gobuild
from kit.catalog import BINARIES, GoBuild, versions_hash
from kit.errors import BuildFailed, MissingTool
from kit.layout import Layout
from kit.progress import Progress

KUBELET = next(binary for binary in BINARIES if binary.name == "kubelet")


class Folders(NamedTuple):
    layout: Layout
    assets: Path
    path: Path


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    made = Folders(
        Layout(tmp_path / "cache", tmp_path / "run", "v"), tmp_path / "a", tmp_path / "p"
    )
    for folder in (made.layout.bin, made.assets, made.path):
        folder.mkdir(parents=True)
    return made


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Kubernetes v1.36.2", (1, 36, 2)),
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+b1", (1, 6, 20)),
        ("docker-registry github.com/docker/distribution v2.8.2+unknown", (2, 8, 2)),
        ("CoreDNS-1.14.7", (1, 14, 7)),
        ("Client Version: v1.32.4-dispatcher\nKustomize Version: v5.5.0", (1, 32, 4)),
        ("v4.1.4+g05fa379", (4, 1, 4)),
        ("kwok version v0.8.0 go1.26.8 (linux/amd64)", (0, 8, 0)),
        ("no such thing", ()),
    ],
)
def test_version_texts_of_the_real_programs_are_understood(text: str, version: object) -> None:
    assert binaries.parse_version(text) == version


def test_the_first_place_with_a_fitting_version_wins(folders: Folders) -> None:
    environment = {"KUBEBUILDER_ASSETS": str(folders.assets), "PATH": str(folders.path)}

    def found() -> Path | None:
        return binaries.look_up(folders.layout, environment).get("kubelet")

    assert found() is None
    cached = program(folders.layout.bin, "kubelet", "echo Kubernetes v1.36.2")
    assert found() == cached
    on_path = program(folders.path, "kubelet", "echo Kubernetes v1.36.0")
    assert found() == on_path
    in_assets = program(folders.assets, "kubelet", "echo Kubernetes v1.36.4")
    assert found() == in_assets
    program(folders.assets, "kubelet", "echo Kubernetes v1.20.2")
    assert found() == on_path
    program(folders.path, "kubelet", "exit 1")
    assert found() == cached


def test_a_folder_of_an_earlier_cluster_is_not_taken_for_the_machine(folders: Folders) -> None:
    folders.layout.path.mkdir(parents=True)
    program(folders.layout.path, "kubelet", "echo Kubernetes v1.36.2")
    assert binaries.look_up(folders.layout, {"PATH": str(folders.layout.path)}) == {}


@pytest.fixture
def fake_go(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a `go` on PATH that runs a script; $out is the file a build writes."""

    def install(script: str) -> None:
        find = 'while [ "$1" != -o ]; do shift; done; out=$2'
        program(folders.path, "go", f"{find}\n{script}")
        monkeypatch.setenv("PATH", f"{folders.path}:/usr/bin:/bin")

    return install


def build(target: Path) -> None:
    assert isinstance(KUBELET.source, GoBuild)
    gobuild.build(KUBELET, KUBELET.source, target, "[1/1]", Progress())


def test_a_build_appears_whole_or_not_at_all(
    folders: Folders, fake_go: Callable[[str], None]
) -> None:
    target = folders.layout.bin / "kubelet"
    fake_go('echo half >"$out"; echo "undefined: app.New"; exit 2')
    with pytest.raises(BuildFailed, match=r"building kubelet failed:\nundefined: app\.New"):
        build(target)
    assert list(folders.layout.bin.iterdir()) == []
    fake_go('echo whole >"$out"')
    build(target)
    assert target.read_text() == "whole\n"
    assert list(folders.layout.bin.iterdir()) == [target]


def test_an_interrupted_build_leaves_no_process_and_no_file(
    folders: Folders, fake_go: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = folders.path / "pid"
    fake_go(f'echo half >"$out"; sleep 300 & echo $! >{mark}; wait')

    def interrupt(text: str, progress: Progress) -> Callable[[float], None]:
        def tick(seconds: float) -> None:
            raise KeyboardInterrupt

        return tick

    monkeypatch.setattr(gobuild, "_ticker", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(folders.layout.bin / "kubelet")
    assert list(folders.layout.bin.iterdir()) == []
    status = Path(f"/proc/{mark.read_text().strip()}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_too_little_disk_space_is_named_before_anything_is_built(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(folders.path, "go", f"echo {folders.path}/mod; echo {folders.path}/build")
    monkeypatch.setenv("PATH", f"{folders.path}:/usr/bin:/bin")
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100 << 30, 98 << 30, 2 << 30))
    with pytest.raises(
        MissingTool, match=r"needs 10\.0 GiB .*2\.0 GiB are free: free 8\.0 GiB more"
    ):
        gobuild.require_disk_space(folders.layout.kit)


def test_the_versions_hash_follows_every_go_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = versions_hash()
    assert before == versions_hash()
    monkeypatch.setattr("kit.catalog.KWOK", "0.8.1")
    assert versions_hash() != before
