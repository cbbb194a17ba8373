"""The chain of hashes that names a prefix: equal hashes mean equal tokens, tenant and engine."""

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence

_FORMAT_VERSION = "tilefleet-kv-2"


def chain_root(fingerprint: str, cache_salt: str) -> bytes:
    """Hash from which the chain of a request starts.

    fingerprint: what makes KV values of two engines differ (model, dtype, layout, rope). The salt
    sits here, so that every block of one tenant differs from every block of another. Fields are
    length-prefixed: ("ab", "c") and ("a", "bc") have different roots.
    """
    digest = hashlib.sha256()
    for text in (_FORMAT_VERSION, fingerprint, cache_salt):
        data = text.encode()
        digest.update(struct.pack("<I", len(data)))
        digest.update(data)
    return digest.digest()


class PrefixChain:
    """The hashes of a request's full blocks: each is the SHA-256 of the root and of all tokens up
    to the end of its block, as uint32, little endian.

    One running hash gives them all. It reads every token once and is set up once, so a block costs
    less than a SHA-256 call of its own. SHA-256 and not a fast hash: a collision would serve one
    tenant's context to another.
    """

    def __init__(self, root: bytes) -> None:
        self._hash = hashlib.sha256(root)

    def extend(self, token_ids: Sequence[int], block_size: int) -> list[bytes]:
        """Hashes of the full blocks that follow; what is left over at the end is not read.

        All tokens become bytes at once, for nothing if they come as array("I").
        """
        tokens = token_ids if isinstance(token_ids, array) else array("I", token_ids)
        if sys.byteorder == "big":
            tokens = array("I", tokens)
            tokens.byteswap()
        if len(tokens) < block_size:
            return []
        whole = memoryview(tokens)[: len(tokens) // block_size * block_size]
        hashes, update, digest = [], self._hash.update, self._hash.digest
        for (block,) in struct.iter_unpack(f"{tokens.itemsize * block_size}s", whole.cast("B")):
            update(block)
            hashes.append(digest())
        return hashes
