"""Compiles the kernels of a start at the same time, before any of them runs.

A launch compiles its kernel and then waits for it, one after the other. Within `compiling`, a
launch starts a compilation in a thread and runs nothing; leaving it waits for all. Compilers work
outside Python's lock most of the time, so as many cores are busy as there are kernels.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

LOGGER = logging.getLogger(__name__)

MAX_THREADS = 16


@contextmanager
def compiling(threads: int = MAX_THREADS) -> Iterator[dict[str, float]]:
    """Launches of Triton kernels within only compile. Yields name → seconds, filled at the end.

    For start-up alone: it holds for all threads of the process. Raises what a compiler raises.
    """
    began = time.monotonic()
    seconds: dict[str, float] = {}
    run, listener = JITFunction.run, triton.knobs.compilation.listener

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            seconds[f"{src.name} {len(seconds)}"] = round(times.total / 1e6, 2)

    JITFunction.run = compile_only
    triton.knobs.compilation.listener = listen
    try:
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool):
            yield seconds
    finally:
        JITFunction.run = run
        triton.knobs.compilation.listener = listener
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:5]
    LOGGER.info(
        "%d kernels compiled in %.1f s, one after the other %.1f s; the slowest: %s",
        len(seconds), time.monotonic() - began, sum(seconds.values()),
        ", ".join(f"{name.split()[0]} {span:.1f} s" for name, span in slowest) or "none",
    )  # fmt: skip
