"""What is measured: the lengths, loads and fixed rows. Pure."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tilefleet_worker.errors import ConfigError

SHORTEST = 0.8
"""Of a curve's nominal lengths: InferenceX draws them uniformly from this share to the whole."""
REQUESTS, WARM_UPS = 10, 2
"""Of a curve, for each request at the same time; as InferenceX has them."""


@dataclass(frozen=True, slots=True)
class Case:
    """One load in a closed loop: a request that ends makes room for the next one.

    prompt, answer: most tokens of each. shortest: of the same, the share that the lengths begin at.
    """

    name: str
    prompt: int
    answer: int
    concurrency: int
    requests: int
    warm_ups: int = 0
    shortest: float = 1.0
    curve: bool = False
    """Whether it is a point of the curve of throughput against speed."""

    def lengths(self, seed: int = 0) -> list[tuple[int, int]]:
        """Tokens of prompt and answer of the warm-ups and of the requests, always the same."""
        draw = random.Random(f"{seed} {self.prompt} {self.answer} {self.concurrency}")

        def of(most: int) -> int:
            return draw.randint(max(1, int(most * self.shortest)), most)

        count = self.warm_ups + self.requests
        return [(of(self.prompt), of(self.answer)) for _ in range(count)]


def curve(lengths: Sequence[tuple[int, int]], concurrency: Sequence[int]) -> Iterator[Case]:
    """Points of the curve of each pair of lengths (prompt, answer)."""
    for prompt, answer in lengths:
        for count in concurrency:
            yield Case(
                f"{prompt}/{answer} at {count}", prompt, answer, count, REQUESTS * count,
                WARM_UPS * count, SHORTEST, True,
            )  # fmt: skip


def rows(scale: int = 1) -> tuple[Case, ...]:
    """The fixed rows. Contexts are those at the end of an answer. scale: divides all lengths."""
    answer = 256 // scale
    return tuple(
        Case(name, context // scale - answer, answer, batch, batch, warm_ups=1)
        for name, batch, context in (
            ("batch 64, context 8K", 64, 8192),
            ("batch 128, context 32K", 128, 32_768),
            ("single, context 4K", 1, 4096 + 256),
        )
    )


def parse_lengths(text: str) -> tuple[int, int]:
    """(prompt, answer) of `PROMPT:ANSWER`. Raises ConfigError for anything else."""
    prompt, _, answer = text.partition(":")
    if not (prompt.isdecimal() and answer.isdecimal() and int(prompt) and int(answer) > 1):
        raise ConfigError(
            f"--lengths {text!r}: give PROMPT:ANSWER in tokens, at least 1:2, such as 8192:1024."
        )
    return int(prompt), int(answer)
