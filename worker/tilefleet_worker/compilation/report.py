"""Compile a variant and read from the machine code what decides its speed: registers, spills, LDS,
matrix instructions and the width of loads.

These find spills, fallbacks and narrow loads. They do not predict time.
"""

import hashlib
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from tilefleet_worker.compilation.target_driver import target_of
from tilefleet_worker.compilation.variant import Variant

# Tensors of torch begin at multiples of 16 bytes, and the strides of a pool are multiples of 16.
_ALIGNED = [["tt.divisibility", 16]]
_UNALIGNED = (
    "window", "splits", "least", "stride_table", "tokens", "pairs", "blocks", "rows", "scale_stride",
    "scale_expert",
)  # fmt: skip
_SAID = "ptxas.txt"
_LOAD_BITS = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32"}


@dataclass(frozen=True)
class Report:
    """Of one variant. registers: vector registers of a lane, accumulators among them.

    spills: vector registers that do not fit, on sm90 bytes of them. scalar_spills: scalar ones,
    which go to lanes of vector registers and not to memory. scratch: bytes of a lane in memory.
    lds: shared memory of a program in bytes. matrix: matrix instruction → count. loads: bits of a
    lane's load from global memory → count.
    """

    registers: int
    spills: int
    scalar_spills: int
    scratch: int
    lds: int
    code_bytes: int
    matrix: Mapping[str, int] = field(default_factory=dict)
    loads: Mapping[str, int] = field(default_factory=dict)


def compile_report(variant: Variant) -> Report:
    """Compile for the variant's architecture; no GPU is needed. Raises what the compiler raises."""
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    attributes = {
        (index,): _ALIGNED
        for index, name in enumerate(names)
        if signature[name].startswith(("*", "i")) and name not in _UNALIGNED
    }
    source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=attributes)
    target = target_of(variant.arch)
    compiled = triton.compile(source, target=target, options=dict(variant.options))
    return _amd(compiled) if target.backend == "hip" else _nvidia(compiled, variant.arch)


def _amd(compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    loads = re.findall(r"(?:global|buffer)_load_(?:lds_)?(\w+)", text)
    return Report(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        scalar_spills=number("sgpr_spill_count"),
        scratch=number("private_segment_fixed_size"),
        lds=compiled.metadata.shared,
        code_bytes=int(re.findall(r"; codeLenInByte = (\d+)", text)[-1]),
        matrix=_counted(re.findall(r"v_mfma_\w+", text)),
        loads=_counted(_LOAD_BITS.get(load, "16 or less") for load in loads),
    )


def _nvidia(compiled: Any, arch: str) -> Report:
    ptx = compiled.asm["ptx"]
    said = _assemble(ptx, arch)

    def number(pattern: str) -> int:
        return int((re.findall(pattern, said) or ["0"])[-1])

    matrix = re.findall(r"((?:wgmma\.mma_async|mma\.sync)\S*?\.(m\d+n\d+k\d+))", ptx)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.\w(\d+)\s", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (?:0x)?(\d+),", ptx)
    return Report(
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes spill stores"),
        scalar_spills=0,
        scratch=number(r"(\d+) bytes stack frame"),
        lds=compiled.metadata.shared,
        code_bytes=_text_bytes(compiled.asm["cubin"]),
        matrix=_counted(f"{name.split('.')[0]} {shape}" for name, shape in matrix),
        loads=_counted(
            [str(int(count or 1) * int(bits)) for count, bits in loads]
            + [f"{int(size, 16 if size == '10' else 10) * 8} async" for size in copies]
            + ["tile by TMA"] * ptx.count("cp.async.bulk.tensor")
        ),
    )


def _assemble(ptx: str, arch: str) -> str:
    """What ptxas says about registers and spills: the loaded module would, but needs a GPU.

    Kept in Triton's cache, as what it compiles is: assembling takes as long as all else.
    """
    command = [get_ptxas(90).path, "-v", f"--gpu-name={arch.replace('sm', 'sm_')}a"]
    key = "\n".join((triton.__version__, *command[1:], ptx))
    kept = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    found = kept.get_file(_SAID)
    if found is not None:
        return Path(found).read_text()
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "kernel.ptx")
        with open(source, "w") as file:
            file.write(ptx)
        run = subprocess.run(
            [*command, source, "-o", os.devnull], check=True, capture_output=True, text=True
        )
    kept.put(run.stderr, _SAID, binary=False)
    return run.stderr


def _text_bytes(elf: bytes) -> int:
    """Size of the code sections: the whole file also holds names and paths."""
    table, entry_size, count, names_index = struct.unpack_from("<Q10xHHH", elf, 0x28)
    headers = [struct.unpack_from("<I20xQQ", elf, table + i * entry_size) for i in range(count)]
    names = headers[names_index][1]
    return sum(
        size for name, _, size in headers if elf[names + name :].startswith((b".text\0", b".text."))
    )


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
