"""An image's tag names its content; Dockerfile, tag and .dockerignore agree on the files."""

import re
import shutil
from pathlib import Path

import inputs
import pytest

ARGUMENTS = {"BASE": "python:3.12-slim"}
COPIED = re.compile(r"^COPY (?:--chmod=\d+ )?((?:\S+ +)+)\S+$", re.M)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of everything that images are made of, with a stand-in where there is no model."""
    for name in {n for names in inputs.TARGETS.values() for n in (*inputs.COMMON, *names)}:
        source, copy = inputs.ROOT / name, tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            shutil.copyfile(source, copy)
    shutil.copyfile(inputs.ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    monkeypatch.setattr(inputs, "ROOT", tmp_path)
    return tmp_path


def tags(folder: Path) -> dict[str, str]:
    return {target: inputs.tag(target, ARGUMENTS, folder) for target in inputs.TARGETS}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {target for target in before if before[target] != after[target]}


@pytest.mark.parametrize(
    ("path", "targets"),
    [
        ("Dockerfile", {"operator", "worker-cpu", "worker"}),
        ("operator/tilefleet_operator/errors.py", {"operator"}),
        ("worker/tilefleet_worker/errors.py", {"worker-cpu", "worker"}),
        ("locks/torch.txt", {"worker-cpu"}),
        ("locks/worker.txt", {"worker-cpu", "worker"}),
        ("hack/image/elf_stub.py", {"worker-cpu"}),
    ],
)
def test_a_changed_file_changes_the_tags_of_its_images_only(
    tree: Path, path: str, targets: set[str]
) -> None:
    before = tags(tree)
    with (tree / path).open("a") as file:
        file.write("# more\n")
    assert changed(before, tags(tree)) == targets


def test_a_renamed_file_changes_the_tag(tree: Path) -> None:
    before = tags(tree)
    package = tree / "operator/tilefleet_operator"
    (package / "errors.py").rename(package / "mistakes.py")
    assert changed(before, tags(tree)) == {"operator"}


def test_byte_code_and_build_arguments(tree: Path) -> None:
    before = tags(tree)
    cache = tree / "operator/tilefleet_operator/__pycache__"
    cache.mkdir(exist_ok=True)
    (cache / "new.cpython-311.pyc").write_bytes(b"x")
    assert not changed(before, tags(tree))
    assert inputs.tag("operator", {"BASE": "other"}) != before["operator"]


def test_the_staged_copy_has_the_same_tag(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    staged = tmp_path_factory.mktemp("staged")
    inputs.stage("worker-cpu", staged)
    assert inputs.tag("worker-cpu", ARGUMENTS, staged) == tags(tree)["worker-cpu"]


def test_a_missing_input_is_named_with_its_remedy(tree: Path) -> None:
    shutil.rmtree(tree / "examples/tiny-model/model")
    with pytest.raises(inputs.ImageError, match=r"examples/tiny-model/model.*train\.py"):
        inputs.tag("worker-cpu", ARGUMENTS, tree)


def test_the_dockerfile_copies_exactly_what_the_tags_cover() -> None:
    text = (inputs.ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    copied = {source for sources in COPIED.findall(text) for source in sources.split()}
    covered = {name for names in inputs.TARGETS.values() for name in (*inputs.COMMON, *names)}
    assert copied == covered - {"Dockerfile"}


def test_dockerignore_lets_through_what_is_copied() -> None:
    text = (inputs.ROOT / ".dockerignore").read_text()
    allowed = tuple(line[1:] for line in text.splitlines() if line.startswith("!"))
    covered = {name for names in inputs.TARGETS.values() for name in (*inputs.COMMON, *names)}
    for name in covered - {"Dockerfile"}:
        assert name.startswith(allowed), name
