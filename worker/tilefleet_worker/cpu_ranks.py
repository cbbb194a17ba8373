"""Both ends of a step on CPUs: the first rank tells it, the others follow."""

from collections.abc import Sequence

import torch

from tilefleet_worker.attention.base import AttentionBackend, AttentionStep
from tilefleet_worker.batch import Batch
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.models import Model
from tilefleet_worker.rank_group import RankGroup
from tilefleet_worker.rank_messages import Kind, Words, from_batch, to_batch


class LeadingModel:
    """The first rank's model: tells the others each step before it computes its own part."""

    def __init__(self, model: Model, group: RankGroup, vocab_size: int) -> None:
        self._model = model
        self._group = group
        self._vocab_size = vocab_size

    def forward(
        self, batch: Batch, attention: Sequence[AttentionStep], cache: KVCache
    ) -> torch.Tensor:
        """See Model.forward. What a request can do wrong is found before anybody is told."""
        worst = int(batch.token_ids.max())
        if worst >= self._vocab_size or int(batch.token_ids.min()) < 0:
            raise IndexError(f"a token id of the step is outside 0 … {self._vocab_size - 1}")
        self._group.tell(Kind.STEP, from_batch(batch))
        try:
            return self._model.forward(batch, attention, cache)
        except Exception as error:
            raise self._group.broken(error) from error


class CPURank:
    """Another rank: its part of the model and of the pool."""

    def __init__(self, model: Model, cache: KVCache, attention: AttentionBackend) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention

    def follow(self, kind: Kind, words: Words) -> None:
        """See RankRunner."""
        with torch.inference_mode():
            if kind == Kind.SCRUB:
                self._cache.scrub(words.tolist())
                return
            batch = to_batch(words)
            steps = [self._attention.plan(part) for part in batch.attention]
            self._model.forward(batch, steps, self._cache)
