"""What each image is made of: the files, and the tag that names their content. Knows no engine."""

import hashlib
import json
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EPOCH = 1767225600  # 2026-01-01; one date for all builds keeps unchanged layers byte-identical
COMMON = (
    "Dockerfile", "locks/uv.txt", "hack/image/bytecode.py", "hack/image/dependencies.py",
)  # fmt: skip
TARGETS: dict[str, tuple[str, ...]] = {
    "operator": ("locks/operator.txt", "operator/tilefleet_operator"),
    "worker-cpu": (
        "locks/torch.txt", "hack/image/torch_layer.py", "hack/image/elf_slim.py",
        "hack/image/elf_stub.py", "locks/worker.txt", "examples/tiny-model/model",
        "worker/tilefleet_worker",
    ),
    "worker": ("locks/worker.txt", "worker/tilefleet_worker"),
}  # fmt: skip
DEFAULT_TARGETS = ("operator", "worker-cpu")
REMEDY = {"examples/tiny-model/model": "train it: python examples/tiny-model/train.py"}


class ImageError(Exception):
    """Something a person must change; the message says what and how."""


def version() -> str:
    """The project's version, as pyproject.toml states it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def files(target: str) -> list[Path]:
    """Input files of a target, relative to the repository, sorted. ImageError if one is missing."""
    found: set[Path] = set()
    for name in (*COMMON, *TARGETS[target]):
        path = ROOT / name
        if not path.exists():
            remedy = REMEDY.get(name, "restore it from version control")
            raise ImageError(f"image {target} needs {name}, which is missing; {remedy}")
        below = [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file())
        found |= {
            p.relative_to(ROOT) for p in below
            if p.suffix != ".pyc" and not any(part.startswith(".") for part in p.parts[-1:])
        }  # fmt: skip
    return sorted(found)


def stage(target: str, folder: Path) -> None:
    """Copy the inputs into folder, so that what is hashed is what is built, even while edited."""
    for path in files(target):
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy)


def tag(target: str, arguments: dict[str, str], folder: Path = ROOT) -> str:
    """16 hex digits over names and bytes of the inputs and over the build arguments.

    folder: the repository, or a staged copy of the inputs.
    """
    digest = hashlib.sha256(
        json.dumps([target, version(), EPOCH, sorted(arguments.items())]).encode()
    )
    for path in files(target):
        content = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        digest.update(f"{path}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def reference(target: str, tag_: str, registry: str = "localhost") -> str:
    """Full image reference: registry/tilefleet/target:tag."""
    return f"{registry.rstrip('/')}/tilefleet/{target}:{tag_}"
