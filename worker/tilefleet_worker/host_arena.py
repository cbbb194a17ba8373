"""Host memory for KV blocks of evicted prefixes, and the copies between it and the pool.

On a GPU it is pinned, and copies are on the stream of the steps: behind the one that is under way
and before the next, so that no copy and no step ever sees a block half written.
"""

from collections.abc import Sequence

import torch

from tilefleet_worker.errors import ConfigError
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.kv_cache import KVCache


class HostArena:
    """One allocation [host blocks, *block], each block as the pool has it, but in one piece."""

    def __init__(self, cache: KVCache, num_blocks: int) -> None:
        """Raises ConfigError when the device's driver refuses to pin so much memory."""
        block = cache.block(cache.spare_block_id)
        self._cache = cache
        # Filling touches every page now: a limit that is too low shows at start, not under load.
        self._tensor = torch.empty((num_blocks, *block.shape), dtype=block.dtype).zero_()
        if block.device.type == "cuda" and num_blocks:
            _pin(self._tensor)

    def copy(self, transfers: Sequence[Transfer]) -> None:
        """Make these copies in their order. On a GPU they are launched, not awaited."""
        with torch.inference_mode():
            for to_host, device_block, host_block in transfers:
                device, host = self._cache.block(device_block), self._tensor[host_block]
                target, source = (host, device) if to_host else (device, host)
                target.copy_(source, non_blocking=True)


def _pin(tensor: torch.Tensor) -> None:
    """Register memory with the driver. PyTorch's own pinned memory is rounded up to a power of two,
    which for 40 GiB would take 64.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(status):
        raise ConfigError(
            f"{tensor.nbytes / 2**30:.1f} GiB of host memory could not be pinned ({status}): lower "
            "--kv-offloading-size, or raise the limit of locked memory."
        )
