"""Runs inside the image build: compiles what has no byte code yet, so layers below stay untouched.

Python's own compileall rewrites the byte code of layers below, which would copy torch's into each
layer above. unchecked-hash: never compared with the source, whose time stamp an image loses.
"""

import importlib.util
import os
import py_compile
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def compiled(source: str) -> bool:
    """Write the byte code of one file; False if it is not valid Python (a template, say)."""
    try:
        py_compile.compile(
            source, doraise=True, quiet=1,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )  # fmt: skip
    except (py_compile.PyCompileError, UnicodeDecodeError, ValueError):
        return False
    return True


def missing(folders: list[str]) -> list[str]:
    """Sources below the folders without byte code, sorted."""
    found = (str(path) for folder in folders for path in Path(folder).rglob("*.py"))
    return sorted(s for s in found if not os.path.exists(importlib.util.cache_from_source(s)))


def main(folders: list[str]) -> int:
    """Compile; always 0, since data files named .py are no error, but say how many were skipped."""
    sources = missing(folders)
    with ProcessPoolExecutor() as pool:
        failed = sum(not done for done in pool.map(compiled, sources, chunksize=64))
    print(f"byte code: {len(sources) - failed} files, {failed} are not Python", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
