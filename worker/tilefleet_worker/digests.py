"""SHA-256 of weight files against what the folder says they are."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tilefleet_worker.errors import ModelError

_CHUNK_BYTES = 8 * 2**20
_LIST_FILE = "SHA256SUMS"
_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64})(?: [ *](?P<name>.+))?")


def check_digests(folder: Path, files: list[Path]) -> int:
    """Compare every file that has a digest with it; return how many had one.

    Digests are taken from FILE.sha256 beside a file, from SHA256SUMS, and from metadata.sha256 (an
    object by file name) of the index. Raises ModelError naming the file that differs.
    """
    expected = _expected(folder, files)
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing leaves the interpreter lock
        found = list(pool.map(_digest, expected))
    for path, digest in zip(expected, found, strict=True):
        if digest != expected[path]:
            raise ModelError(
                f"{path}: its SHA-256 is {digest}, expected {expected[path]}. Download it again."
            )
    return len(expected)


def _expected(folder: Path, files: list[Path]) -> dict[Path, str]:
    listed = _read_list(folder / _LIST_FILE) | _from_index(folder)
    expected = {}
    for path in files:
        sidecar = path.with_name(path.name + ".sha256")
        digests = set(_read_list(sidecar, path.name).values()) | {listed.get(path.name)}
        digests.discard(None)
        if len(digests) > 1:
            raise ModelError(f"{path}: {sidecar.name} and the folder's list name two digests.")
        if digests:
            expected[path] = str(digests.pop())
    return expected


def _read_list(path: Path, only_name: str = "") -> dict[str, str]:
    """Digest by file name of a list as sha256sum writes it."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None or not (match["name"] or only_name):
            raise ModelError(f"{path}: {line!r} is not a SHA-256 and a file name.")
        found[only_name or match["name"]] = match["digest"].lower()
    return found


def _from_index(folder: Path) -> dict[str, str]:
    """Digest by file name of the index, as far as it has any. A damaged index is found later."""
    try:
        text = (folder / "model.safetensors.index.json").read_text(encoding="utf-8")
        listed = json.loads(text)["metadata"]["sha256"]
        return {str(name): str(digest).lower() for name, digest in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    return digest.hexdigest()
