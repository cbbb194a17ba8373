"""A slimmed library works as before; device code in its middle becomes zero pages."""

import ctypes
import shutil
import subprocess
import zlib
from pathlib import Path

import elf_slim
import pytest
from elf_slim import LOAD, NOTE, Segment

# A library as nvcc links it: 64 KB of "device code" amid the read-only data, symbols beside it.
SOURCE = """
__attribute__((section(".nv_fatbin"))) const unsigned char device[1 << 16] = {[0 ... (1 << 16) - 1] = 7};
const char after[] = "after the device code";
static int counter = 41;
int device_at(int index) { return device[index]; }
const char *text(void) { return after; }
int count(void) { return ++counter; }
"""  # noqa: E501


def mapped(name: str) -> Path:
    """Path of a shared library that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(Path(path) for line in lines if name in (path := line.split()[-1]))


def test_a_slim_library_computes_the_same(tmp_path: Path) -> None:
    original = mapped("libz.so").read_bytes()
    copy = tmp_path / "libslim.so"
    copy.write_bytes(original)
    assert elf_slim.rewrite(copy) == len(original) - copy.stat().st_size > 0
    assert ctypes.CDLL(str(copy)).adler32(1, b"tile", 4) == zlib.adler32(b"tile")


@pytest.mark.skipif(not shutil.which("gcc"), reason="builds a library with gcc")
def test_device_code_becomes_zeros_and_the_rest_stays(tmp_path: Path) -> None:
    library = tmp_path / "libdevice.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,--build-id", "-x", "c", "-", "-o", str(library)],
        input=SOURCE, text=True, check=True,
    )  # fmt: skip
    assert elf_slim.rewrite(library) > (1 << 16) - 3 * 4096
    loaded = ctypes.CDLL(str(library))
    loaded.text.restype = ctypes.c_char_p
    assert (loaded.device_at(0), loaded.device_at(1 << 15)) == (7, 0)
    assert loaded.text() == b"after the device code"
    assert (loaded.count(), loaded.count()) == (42, 43)


def test_a_split_needs_the_entry_of_a_note() -> None:
    whole = Segment(LOAD, 4, 0x1000, 0x1000, 0x1000, 0x9000, 0x9000, 0x1000)
    note = Segment(NOTE, 4, 0x200, 0x200, 0x200, 36, 36, 4)
    first, second = elf_slim.split([note, whole], 0x2000, 0x7800)
    assert (first.offset, first.file_size, first.memory_size) == (0x1000, 0x2000, 0x6000)
    assert (second.offset, second.address, second.file_size) == (0x7000, 0x7000, 0x3000)
    with pytest.raises(ValueError, match="PT_NOTE"):
        elf_slim.split([whole], 0x2000, 0x7800)


def test_packed_segments_keep_their_alignment_and_never_overlap() -> None:
    loads = [
        Segment(LOAD, 4, 0, 0, 0, 0x1234, 0x1234, 0x1000),
        Segment(LOAD, 6, 0x9ABC, 0x5ABC, 0x5ABC, 0x100, 0x900, 0x1000),
        Segment(LOAD, 6, 0x20000, 0x20000, 0x20000, 0x10, 0x10, 0x10000),
    ]
    assert elf_slim.packed_offsets(loads) == [0, 0x1ABC, 0x10000]


def test_what_is_no_library_is_refused() -> None:
    with pytest.raises(ValueError, match="not a 64-bit ELF"):
        elf_slim.slim(b"\x7fELF" + bytes(100))
