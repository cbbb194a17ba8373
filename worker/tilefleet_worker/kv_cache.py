"""The KV cache: one allocation, its size decided before it is made."""

from collections.abc import Callable, Sequence

import torch

from tilefleet_worker.errors import ConfigError
from tilefleet_worker.layer_kinds import CacheLayout, LayerKind
from tilefleet_worker.model_config import ModelConfig


def block_bytes(
    config: ModelConfig,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    layout: CacheLayout | None = None,
) -> int:
    """Bytes of one block over all of its layers, keys and values. layout: see KVCache."""
    layers = (layout or CacheLayout.uniform(config.num_layers)).layers_per_block
    return layers * 2 * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def num_blocks_for(
    config: ModelConfig,
    block_size: int,
    kv_cache_bytes: int,
    dtype: torch.dtype = torch.float32,
    layout: CacheLayout | None = None,
) -> int:
    """Blocks that fit the memory, beside the spare one. Raises ConfigError when one token's do not.

    layout: see KVCache.
    """
    layout = layout or CacheLayout.uniform(config.num_layers)
    size = block_bytes(config, block_size, dtype, layout)
    count = kv_cache_bytes // size - 1
    least = sum(kind.width for kind in layout.kinds)
    if count < least:
        raise ConfigError(
            f"The KV cache has {kv_cache_bytes} bytes, but a block of {block_size} tokens takes "
            f"{size} and {least + 1} are needed: give it at least {(least + 1) * size} bytes."
        )
    return count


def host_blocks_for(kv_offloading_bytes: int, size: int, kinds: Sequence[LayerKind]) -> int:
    """Blocks of `size` bytes that fit into host memory; 0 for no memory.

    Raises ConfigError when there is some, but too little for a span of every kind.
    """
    least, count = max(kind.width for kind in kinds), kv_offloading_bytes // size
    if kv_offloading_bytes > 0 and count < least:
        raise ConfigError(
            f"--kv-offloading-size is {kv_offloading_bytes} bytes, but a prefix takes at least "
            f"{least} blocks of {size}: give at least {least * size}, or leave it out."
        )
    return count


class KVCache:
    """One tensor [layers of a block, 2, blocks + 1, block_size, kv_heads, head_dim], zeroed.

    layout: where each layer is; without one all layers are in every block. The block after the
    last is a spare of nobody: self-checks write there, padding reads it, and so do queries where a
    block has left their window, behind a mask.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: CacheLayout | None = None,
        on_scrub: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """on_scrub: told the blocks that are cleaned, of which other ranks hold parts."""
        self._on_scrub = on_scrub
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layout = layout or CacheLayout.uniform(config.num_layers)
        shape = (
            self.layout.layers_per_block,
            2,
            num_blocks + 1,
            block_size,
            config.num_kv_heads,
            config.head_dim,
        )
        # Filling touches every page now: a limit that is too low shows at start, not under load.
        self._tensor = torch.empty(shape, dtype=dtype, device=device).zero_()
        self._layers = tuple(self._tensor.unbind(0))

    @property
    def num_tables(self) -> int:
        """Block tables of a request: groups of layers that have blocks of their own."""
        return sum(kind.width for kind in self.layout.kinds)

    @property
    def spare_block_id(self) -> int:
        """Id of the block that belongs to no request."""
        return self.num_blocks

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens of a request."""
        return -(-num_tokens // self.block_size)

    def layer(self, index: int) -> torch.Tensor:
        """Keys and values of one layer: [2, blocks + 1, block_size, kv_heads, head_dim]."""
        return self._layers[self.layout.places[index]]

    def block(self, block_id: int) -> torch.Tensor:
        """All of one block: [layers of a block, 2, block_size, kv_heads, head_dim]."""
        return self._tensor[:, :, block_id]

    def scrub(self, block_ids: Sequence[int]) -> None:
        """Replace values that are not finite by 0 in these blocks.

        A masked position is multiplied by 0, and 0 × NaN is NaN: what a faulty request leaves
        behind would reach the next owner of its blocks. Finite values do not change.
        """
        if self._on_scrub is not None:
            self._on_scrub(block_ids)
        for block in block_ids:
            self._tensor[:, :, block].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
