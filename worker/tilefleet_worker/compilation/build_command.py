"""`python -m tilefleet_worker kernels build`: compile what models need into a cache to ship."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tilefleet_worker.compilation.target_driver import ARCHITECTURES
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import ConfigError, WorkerError
from tilefleet_worker.model_shapes import SHAPES, named_config


def build_kernels(arguments: Sequence[str]) -> int:
    """Fill the cache, print a line a model and architecture, and return the exit status."""
    options = _parser().parse_args(arguments)
    cache = Path(options.cache or os.environ.get("TRITON_CACHE_DIR", ""))
    try:
        if not options.cache and not cache.name:
            raise ConfigError("no cache: give --cache FOLDER, or set TRITON_CACHE_DIR.")
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())  # read at each compilation
        for arch in options.arch or ARCHITECTURES:
            for model in options.model or SHAPES:
                _build(arch, model, options, cache)
    except (WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _build(arch: str, model: str, options: argparse.Namespace, cache: Path) -> None:
    from tilefleet_worker.compilation.build import build
    from tilefleet_worker.gpu_engine import DTYPES

    began = time.monotonic()
    config = named_config(model)
    wanted = EngineConfig(
        backend="triton", dtype=options.dtype, max_model_len=options.max_model_len,
        max_batch_tokens=options.max_batch_tokens, max_concurrent=options.max_concurrent,
        block_size=options.block_size,
    ).resolve(model_max_len=config.max_positions, gpu=True)  # fmt: skip
    built = build(arch, config, wanted, DTYPES[wanted.dtype], cache)
    print(
        f"{arch} {model}: {built.needed} kernels, {built.compiled} compiled, "
        f"{time.monotonic() - began:.1f} s",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tilefleet_worker kernels build",
        description="Compile the kernels of models for GPUs that are not there into Triton's cache. "
        "A worker with the same Triton and the same flags finds them there.",
    )
    add, plain = parser.add_argument, EngineConfig()
    add("--arch", choices=ARCHITECTURES, action="append", help="may be repeated (default: all)")
    add("--model", action="append", metavar="NAME|FOLDER",
        help=f"one of {', '.join(SHAPES)}, or a folder with a config.json; may be repeated "
        "(default: all named ones)")  # fmt: skip
    add("--cache", metavar="FOLDER", help="to fill (default: TRITON_CACHE_DIR)")
    add("--dtype", choices=("auto", "bfloat16", "float16"), default=plain.dtype,
        help="as serve will be told (default: %(default)s)")  # fmt: skip
    for flag in ("max_model_len", "max_batch_tokens", "max_concurrent", "block_size"):
        add(f"--{flag.replace('_', '-')}", type=int, default=getattr(plain, flag), metavar="N",
            help="as serve will be told (default: %(default)s)")  # fmt: skip
    return parser
