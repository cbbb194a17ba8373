"""A group of ranks on CPUs, of which this process is the first: one model after another."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tilefleet_worker.collectives import Collectives
from tilefleet_worker.cpu_engine import CPUParts, load_cpu
from tilefleet_worker.cpu_ranks import LeadingModel
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.rank_group import RankGroup

# 2 in `make test`; `make test-ranks` runs the same with 4 and 8.
RANKS = int(os.environ.get("TILEFLEET_TEST_RANKS", "2"))


class Ranks:
    """The group, and this process's part of the model that it serves now."""

    def __init__(self, size: int = RANKS) -> None:
        self.group = RankGroup(size, "cpu", threads=1)
        self._collectives = Collectives(0, size, torch.device("cpu"))

    def parts(self, folder: Path, block_size: int) -> CPUParts:
        """Let every rank load a model. A pool of 128 blocks or more."""
        config = ModelConfig.from_folder(folder)
        options = EngineConfig("cpu", kv_cache_bytes=2**25, block_size=block_size)
        options = options.resolve(model_max_len=config.max_positions)
        self.group.load({"model_dir": str(folder), "config": asdict(options)})
        parts = load_cpu(
            folder, config, options, self._collectives,
            after_weights=self._meet, on_scrub=self.group.scrub,
        )  # fmt: skip
        return replace(parts, model=LeadingModel(parts.model, self.group, config.vocab_size))

    def _meet(self) -> None:
        self.group.await_all()
        self._collectives.join(self.group.store)

    def end(self) -> list[int | None]:
        """Tell the ranks to end: their exit statuses."""
        self.group.close()
        self._collectives.leave()
        return self.group.exit_statuses()
