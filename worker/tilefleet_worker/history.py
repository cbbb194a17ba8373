"""What a request has said so far, as its penalties and bad words look at it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class TokenHistory:
    """Grows by one token at a time; asked once a step. Knows no logits."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._prompt_ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._counts: dict[int, int] = {}
        self._generated: list[int] = []

    def append(self, token_id: int) -> None:
        """Note a generated token."""
        self._generated.append(token_id)
        self._counts[token_id] = self._counts.get(token_id, 0) + 1

    def generated(self) -> tuple[Ids, Ids]:
        """Ids that were generated, each once, and how often."""
        size = len(self._counts)
        ids = np.fromiter(self._counts.keys(), np.int64, size)
        return ids, np.fromiter(self._counts.values(), np.int64, size)

    def seen(self) -> Ids:
        """Ids of prompt and answer, each once."""
        return np.union1d(self._prompt_ids, self.generated()[0])

    def ends_with(self, token_ids: Sequence[int]) -> bool:
        """True when the answer so far ends with these tokens; no tokens end every answer."""
        size = len(token_ids)
        return size == 0 or self._generated[-size:] == list(token_ids)
