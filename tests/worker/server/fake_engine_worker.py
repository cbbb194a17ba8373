"""Starts the real server over the real engine and scheduler, with the fake runner as the device.

Run as a script: `fake_engine_worker.py STEP_SECONDS LOAD_SECONDS [flags of serve]`.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.config import parse_args
from tilefleet_worker.engine import Engine
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.fake_runner import FakeRunner
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.server.serve import serve
from tilefleet_worker.stats import EngineInfo

VOCABULARY = 260  # the tokenizer knows 258; the fake runner generates only 256
POISON = 259
MODEL_LENGTH = 512
BLOCK_BYTES = 4096


class Builder:
    """What `build_engine` is to the real worker."""

    def __init__(self, step_seconds: float, load_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._load_seconds = load_seconds

    def __call__(
        self, model_dir: Path, options: EngineConfig, **hooks: Callable[..., None]
    ) -> Engine:
        time.sleep(self._load_seconds)
        config = options.resolve(model_max_len=MODEL_LENGTH)
        num_blocks = config.kv_cache_bytes // BLOCK_BYTES - 1
        pool = BlockPool(
            num_blocks,
            config.block_size,
            token_bytes=BLOCK_BYTES // config.block_size,
            prefix_caching=config.prefix_caching,
        )
        scheduler = Scheduler(
            pool,
            config.max_batch_tokens,
            config.max_concurrent,
            config.max_model_len,
            vocab_size=VOCABULARY,
            eos_token_ids=(256,),
        )
        info = EngineInfo(
            VOCABULARY,
            config.max_model_len,
            config.block_size,
            eos_token_ids=(256,),
            device={"kind": "cpu", "name": "fake", "arch": "none", "memory_bytes": 0},
            config={"kv_block_bytes": BLOCK_BYTES},
        )
        hooks["on_phase"]("weights", self._load_seconds)
        runner = FakeRunner(256, self._step_seconds, fault_token_id=POISON)
        return Engine(config, runner, scheduler, info=info)


def main() -> int:
    step_seconds, load_seconds = map(float, sys.argv[1:3])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return serve(parse_args(sys.argv[3:]), lambda: Builder(step_seconds, load_seconds))


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)
