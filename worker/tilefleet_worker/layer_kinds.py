"""Which layers cache alike, and how their keys and values share blocks of one size.

A *kind* is all layers that look back equally far. Layers are cut into groups of equal size, the
largest that divides every kind, and a block holds `block_size` tokens of one group. So blocks of
all kinds have the same bytes, any kind may take any block, and nothing is padded. A *span* is what
one kind needs for `block_size` tokens of a request: one block for each of its groups.
Knows no pool and no request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that cache alike."""

    name: str
    """`full`, or `window-` and its tokens: how metrics and /kv call it."""
    window: int = 0
    """Latest keys that a query sees, its own among them; 0: all."""
    width: int = 1
    """Blocks of a span: groups of layers of this kind."""

    def first_span(self, num_computed: int, block_size: int) -> int:
        """First span that a query behind `num_computed` tokens still sees a key of."""
        return max(0, num_computed - self.window + 1) // block_size if self.window else 0


FULL = LayerKind("full")


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Where the keys and values of each layer are."""

    kinds: tuple[LayerKind, ...]
    layers_per_block: int
    tables: tuple[int, ...]
    """Of each layer: which of a request's block tables it reads. Tables are numbered over all
    groups of the first kind, then those of the next."""
    places: tuple[int, ...]
    """Of each layer: its place among the layers of a block."""

    @classmethod
    def uniform(cls, num_layers: int) -> "CacheLayout":
        """All layers in one block, and all tokens kept: for devices that read one table."""
        return cls((FULL,), num_layers, (0,) * num_layers, tuple(range(num_layers)))

    @classmethod
    def of(cls, windows: Sequence[int], max_model_len: int) -> "CacheLayout":
        """The layout of layers with these windows (0: none), full attention first.

        A window that no request of `max_model_len` tokens can leave counts as full.
        """
        reach = [window if 0 < window < max_model_len else 0 for window in windows]
        size = math.gcd(*(reach.count(window) for window in set(reach)))
        kinds: list[LayerKind] = []
        tables, places = [0] * len(reach), [0] * len(reach)
        num_tables = 0
        for window in sorted(set(reach)):
            layers = [index for index, value in enumerate(reach) if value == window]
            for number, layer in enumerate(layers):
                tables[layer] = num_tables + number // size
                places[layer] = number % size
            width = len(layers) // size
            name = f"window-{window}" if window else FULL.name
            kinds.append(LayerKind(name, window, width))
            num_tables += width
        return cls(tuple(kinds), size, tuple(tables), tuple(places))


@dataclass(frozen=True, slots=True)
class Demand:
    """Spans and blocks that requests need. Pure.

    lookahead: tokens of a request that one step may compute. A window kind gets blocks for so many
    only, so a long prompt never holds more of it than window and step; full kinds get blocks for
    all tokens that a request has.
    """

    kinds: tuple[LayerKind, ...]
    block_size: int
    lookahead: int

    @property
    def span_blocks(self) -> int:
        """Blocks that `block_size` tokens take in all kinds."""
        return sum(kind.width for kind in self.kinds)

    def spans(self, num_tokens: int) -> int:
        """Spans that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def admission(self, num_tokens: int, num_hit_spans: int) -> list[int]:
        """New spans of each kind for a request that starts with a hit of so many."""
        computed = num_hit_spans * self.block_size
        soon = self.spans(min(num_tokens, computed + self.lookahead)) - num_hit_spans
        all_of_it = self.spans(num_tokens) - num_hit_spans
        return [soon if kind.window else all_of_it for kind in self.kinds]

    def blocks(self, spans: Sequence[int]) -> int:
        """Blocks of so many spans of each kind."""
        return sum(kind.width * count for kind, count in zip(self.kinds, spans, strict=True))

    def most_blocks(self, max_total_tokens: int) -> int:
        """Most blocks that a request of so many tokens ever holds, also with a step in flight."""
        total, most = self.spans(max_total_tokens), 0
        for kind in self.kinds:
            tokens = kind.window - 1 + 2 * self.lookahead  # touches one span more than it fills
            peak = (tokens - 2) // self.block_size + 2 if kind.window else total
            most += kind.width * min(total, peak)
        return most

    def longest(self, num_blocks: int, at_most: int) -> int:
        """Longest request, up to `at_most` tokens, that fits so many blocks; 0 when none does."""
        low, high = 0, at_most
        while low < high:
            middle = (low + high + 1) // 2
            if self.most_blocks(middle) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low
