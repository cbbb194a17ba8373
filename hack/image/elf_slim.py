"""Rewrites a shared library without what a CPU process never reads: device code, symbol tables.

Kept are the loaded segments, each at its address. The section .nv_fatbin, device code in the middle
of a read-only segment, becomes zero pages: that segment is split in two, and the entry that the
split needs is the build id's (PT_NOTE). Section headers and what is never mapped go.
Format: System V ABI, ELF-64.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from elf_stub import HEADER, PROGRAM, SECTION, is_elf

DEVICE_CODE = b".nv_fatbin"
LOAD, NOTE = 1, 4


@dataclass(frozen=True)
class Segment:
    """One program header; the fields in the file's order."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    file_size: int
    memory_size: int
    align: int

    @property
    def end(self) -> int:
        """Offset in the file behind the segment's content."""
        return self.offset + self.file_size

    def packed(self) -> bytes:
        """The program header's bytes."""
        return PROGRAM.pack(
            self.kind, self.flags, self.offset, self.address, self.physical, self.file_size,
            self.memory_size, self.align,
        )  # fmt: skip


def device_code(data: bytes, header: tuple[int, ...]) -> tuple[int, int]:
    """Start and end of the device code in the file; (0, 0) if there is none."""
    table = data[header[6] : header[6] + header[11] * header[12]]
    sections = list(SECTION.iter_unpack(table))
    names = sections[header[13]][4] if sections else 0
    for section in sections:
        start = names + section[0]
        if data[start : data.index(b"\0", start)] == DEVICE_CODE:
            return section[4], section[4] + section[5]
    return 0, 0


def split(segments: list[Segment], start: int, end: int) -> list[Segment]:
    """Segments in which [start, end) of the file, less a page at its front, is zero pages.

    The front page stays because the CUDA runtime may look at the fat binary's header. Pure.
    Raises ValueError if there is no PT_NOTE whose entry the split can take.
    """
    whole = next((s for s in segments if s.kind == LOAD and s.offset <= start < s.end), None)
    note = next((s for s in segments if s.kind == NOTE), None)
    if whole is None or note is None:
        raise ValueError("no loaded segment holds the device code, or no PT_NOTE can be given up")
    cut = -(-(start + 4096) // whole.align) * whole.align - whole.offset
    rest = end // whole.align * whole.align - whole.offset
    if rest <= cut:
        return segments
    first = replace(whole, file_size=cut, memory_size=rest)
    second = replace(
        whole, offset=whole.offset + rest, address=whole.address + rest,
        physical=whole.physical + rest, file_size=whole.file_size - rest,
        memory_size=whole.memory_size - rest,
    )  # fmt: skip
    return [
        part for s in segments if s is not note
        for part in ([first, second] if s is whole else [s])
    ]  # fmt: skip


def packed_offsets(loads: list[Segment]) -> list[int]:
    """New offsets of the loaded segments, close together; each as its alignment asks. Pure."""
    position, offsets = 0, []
    for load in loads:
        position += (load.address - position) % load.align
        offsets.append(position)
        position += load.file_size
    return offsets


def slim(data: bytes) -> bytes:
    """The library without device code and unmapped bytes. ValueError if it is no 64-bit ELF."""
    if not is_elf(data):
        raise ValueError("not a 64-bit ELF for x86-64 or AArch64")
    header = list(HEADER.unpack_from(data))
    table = data[header[5] : header[5] + header[9] * header[10]]
    segments = [Segment(*entry) for entry in PROGRAM.iter_unpack(table)]
    start, end = device_code(data, tuple(header))
    if end:
        segments = split(segments, start, end)
    loads = [s for s in segments if s.kind == LOAD]
    offsets = packed_offsets(loads)

    def moved(offset: int) -> int:
        for load, new in zip(loads, offsets, strict=True):
            if load.offset <= offset < load.end:
                return new + offset - load.offset
        return 0  # not in the file: PT_GNU_STACK and the like

    out = bytearray(offsets[-1] + loads[-1].file_size)
    for load, new in zip(loads, offsets, strict=True):
        out[new : new + load.file_size] = data[load.offset : load.end]
    entries = b"".join(replace(s, offset=moved(s.offset)).packed() for s in segments)
    header[5], header[6], header[10] = moved(header[5]), 0, len(segments)
    header[12] = header[13] = 0
    out[: HEADER.size] = HEADER.pack(*header)
    out[header[5] : header[5] + len(entries)] = entries
    return bytes(out)


def rewrite(path: Path) -> int:
    """Put the slim library in the library's place; bytes saved."""
    before = path.read_bytes()
    after = slim(before)
    path.unlink()  # the file may be a hard link into a cache
    path.write_bytes(after)
    path.chmod(0o755)
    return len(before) - len(after)
