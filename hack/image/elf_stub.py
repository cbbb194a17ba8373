"""Makes a small shared library with the same name and symbols as a large one, and no code in it.

torch's CUDA build names libraries that a CPU process never calls, 1.7 GB of them; without them the
dynamic loader refuses the process. A stub satisfies the loader: names and versions of the symbols
are the original's, every function returns 1 (in each of these libraries a status that means
failure, such as CUBLAS_STATUS_NOT_INITIALIZED) and every object is zero.
Format: System V ABI, ELF-64; symbol versions: Linux Standard Base, "Symbol Versioning".
"""

import struct
from dataclasses import dataclass
from pathlib import Path

PAGE = 0x10000  # the largest page size of both machines
# e_machine → code of "return 1"
RETURN_ONE = {
    62: bytes.fromhex("b801000000c3"),  # x86-64: mov eax, 1; ret
    183: bytes.fromhex("20008052c0035fd6"),  # AArch64: mov w0, #1; ret
}
DYNAMIC, DYNSYM, VERDEF, VERSYM = 6, 11, 0x6FFFFFFD, 0x6FFFFFFF  # section types
FUNCTION, IFUNC, THREAD_LOCAL = 2, 10, 6  # symbol types
UNDEFINED, ABSOLUTE = 0, 0xFFF1  # section indices
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM = struct.Struct("<IIQQQQQQ")
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")
PAIR = struct.Struct("<qQ")


@dataclass(frozen=True)
class Library:
    """What the loader reads of a shared library."""

    machine: int
    symbols: bytes
    strings: bytes
    versions: bytes  # one number a symbol; empty if the library has no versions
    definitions: bytes
    definition_count: int
    soname: int  # offset in strings, 0 if none


def is_elf(start: bytes) -> bool:
    """True if a file that starts so is a little-endian 64-bit ELF for a machine known here."""
    if len(start) < HEADER.size or not start.startswith(b"\x7fELF\x02\x01"):
        return False
    return HEADER.unpack_from(start)[2] in RETURN_ONE


def read(path: Path) -> Library:
    """Parse a library's dynamic symbols. ValueError if it is not a 64-bit ELF that has them."""
    with path.open("rb") as file:
        start = file.read(HEADER.size)
        header = HEADER.unpack(start)
        if not is_elf(start):
            raise ValueError(f"{path} is not a 64-bit ELF for x86-64 or AArch64")

        def at(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        table = at(header[6], header[11] * header[12])
        sections = list(SECTION.iter_unpack(table))
        by_type = {section[1]: section for section in sections}
        if DYNSYM not in by_type or DYNAMIC not in by_type:
            raise ValueError(f"{path} has no dynamic symbols")

        def content(kind: int) -> bytes:
            return at(by_type[kind][4], by_type[kind][5]) if kind in by_type else b""

        strings = sections[by_type[DYNSYM][6]]
        dynamic = dict(PAIR.iter_unpack(content(DYNAMIC)))
        return Library(
            machine=header[2], symbols=content(DYNSYM), strings=at(strings[4], strings[5]),
            versions=content(VERSYM), definitions=content(VERDEF),
            definition_count=by_type[VERDEF][7] if VERDEF in by_type else 0,
            soname=dynamic.get(14, 0),
        )  # fmt: skip


def hashed(name: bytes) -> int:
    """The System V hash of a symbol name."""
    value = 0
    for byte in name:
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & ~high & 0xFFFFFFFF
    return value


def hash_table(symbols: bytes, strings: bytes) -> bytes:
    """DT_HASH over the defined symbols; the loader finds no other."""
    entries = list(SYMBOL.iter_unpack(symbols))
    buckets, chain = [0] * (len(entries) // 2 + 1), [0] * len(entries)
    for index, entry in enumerate(entries):
        if index and entry[3] != UNDEFINED:
            name = strings[entry[0] : strings.index(b"\0", entry[0])]
            bucket = hashed(name) % len(buckets)
            chain[index], buckets[bucket] = buckets[bucket], index
    words = [len(buckets), len(chain), *buckets, *chain]
    return struct.pack(f"<{len(words)}I", *words)


def placed(symbols: bytes, code: int, data: int) -> tuple[bytes, int]:
    """The symbol table with functions at code and objects at data; bytes that data needs."""
    moved, needed = [], 8
    for name, info, other, section, value, size in SYMBOL.iter_unpack(symbols):
        if section in (UNDEFINED, ABSOLUTE):
            moved.append((name, info, other, section, value, size))
        elif info & 15 in (FUNCTION, IFUNC):
            moved.append((name, info & 0xF0 | FUNCTION, other, 1, code, 8))
        elif info & 15 == THREAD_LOCAL:
            raise ValueError("thread-local symbols cannot be stubbed")
        else:
            needed = max(needed, size)
            moved.append((name, info, other, 1, data, size))
    return b"".join(SYMBOL.pack(*entry) for entry in moved), needed


def stub(library: Library) -> bytes:
    """The stub as a file: a segment to execute, and one to write (dynamic table, objects)."""
    code = RETURN_ONE[library.machine]
    parts = {  # name → content; the symbol table's addresses are known only after the layout
        "code": code, "symbols": library.symbols, "strings": library.strings,
        "hash": hash_table(library.symbols, library.strings),
        "versions": library.versions, "definitions": library.definitions,
    }  # fmt: skip
    address, position = {}, HEADER.size + 4 * PROGRAM.size
    for name, content in parts.items():
        address[name] = position = (position + 15) & ~15
        position += len(content)
    text_end = position
    table = (text_end + PAGE - 1) & ~(PAGE - 1)
    tags = [
        (4, address["hash"]), (5, address["strings"]), (6, address["symbols"]),
        (10, len(library.strings)), (11, SYMBOL.size),
    ]  # fmt: skip
    if library.soname:
        tags.append((14, library.soname))
    if library.versions:
        tags.append((0x6FFFFFF0, address["versions"]))
    if library.definitions:
        tags += [(0x6FFFFFFC, address["definitions"]), (0x6FFFFFFD, library.definition_count)]
    dynamic = b"".join(PAIR.pack(*tag) for tag in [*tags, (0, 0)])
    data = table + ((len(dynamic) + 63) & ~63)
    parts["symbols"], data_bytes = placed(library.symbols, address["code"], data)
    end = data + data_bytes
    file = bytearray(table + len(dynamic))
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    file[: HEADER.size] = HEADER.pack(
        ident, 3, library.machine, 1, 0, HEADER.size, 0, 0, HEADER.size, PROGRAM.size, 4, 0, 0, 0
    )
    segments = [
        (1, 5, 0, 0, 0, text_end, text_end, PAGE),
        (1, 6, table, table, table, len(dynamic), end - table, PAGE),
        (2, 6, table, table, table, len(dynamic), len(dynamic), 8),
        (0x6474E551, 6, 0, 0, 0, 0, 0, 16),  # GNU_STACK: not executable
    ]
    for index, segment in enumerate(segments):
        PROGRAM.pack_into(file, HEADER.size + index * PROGRAM.size, *segment)
    for name, content in parts.items():
        file[address[name] : address[name] + len(content)] = content
    file[table:] = dynamic
    return bytes(file)


def replace(path: Path) -> int:
    """Put the stub in the library's place; bytes saved."""
    before = path.stat().st_size
    content = stub(read(path))
    path.unlink()  # the file may be a hard link into a cache
    path.write_bytes(content)
    path.chmod(0o755)
    return before - len(content)
