"""A stub of a real, versioned library satisfies the loader and does nothing."""

import ctypes
import os
import subprocess
import sys
import zlib
from pathlib import Path

import elf_stub
import pytest

ADLER_OF_A = zlib.adler32(b"a")


def mapped(name: str) -> Path:
    """Path of a shared library that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(Path(path) for line in lines if name in (path := line.split()[-1]))


@pytest.fixture
def library() -> Path:
    return mapped("libz.so")


def test_a_function_returns_one(library: Path, tmp_path: Path) -> None:
    copy = tmp_path / "libstub.so"
    copy.write_bytes(elf_stub.stub(elf_stub.read(library)))
    assert ctypes.CDLL(str(copy)).adler32(0, b"a", 1) == 1
    assert ADLER_OF_A != 1


@pytest.mark.skipif(not hasattr(zlib, "__file__"), reason="this Python has zlib built in")
def test_what_was_linked_against_versions_loads_the_stub(library: Path, tmp_path: Path) -> None:
    """CPython's zlib module names ZLIB_1.2.x versions; the loader would refuse a stub without."""
    parsed = elf_stub.read(library)
    assert parsed.definitions
    (tmp_path / "libz.so.1").write_bytes(elf_stub.stub(parsed))
    code = f"import ctypes; print(ctypes.CDLL({zlib.__file__!r}, 2).adler32(0, b'a', 1))"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "LD_BIND_NOW": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_replacing_leaves_a_hard_link_alone(library: Path, tmp_path: Path) -> None:
    """uv may link a file from its cache, which other environments use."""
    cached, installed = tmp_path / "cached.so", tmp_path / "installed.so"
    cached.write_bytes(library.read_bytes())
    os.link(cached, installed)
    elf_stub.replace(installed)
    assert cached.read_bytes() == library.read_bytes()
    assert installed.read_bytes() != cached.read_bytes()


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "x.so"
    other.write_bytes(bytes(64))
    with pytest.raises(ValueError, match="not a 64-bit ELF"):
        elf_stub.read(other)
