"""The chain of hashes that names a prefix: equal hashes mean equal tokens, tenant and engine."""

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence

_FORMAT_VERSION = "tilefleet-kv-1"


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


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block: SHA-256 of its parent's hash and its tokens as uint32, little endian.

    SHA-256 and not a fast hash: a collision would serve one tenant's context to another.
    """
    return extend_chain(parent, token_ids, len(token_ids))[0]


def extend_chain(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of consecutive full blocks; what is left over at the end has none.

    All tokens become bytes at once, for nothing if they come as array("I"): a block then costs
    little more than its SHA-256.
    """
    tokens = token_ids if isinstance(token_ids, array) else array("I", token_ids)
    if sys.byteorder == "big":
        tokens = array("I", tokens)
        tokens.byteswap()
    if len(tokens) < block_size:
        return []
    whole = memoryview(tokens)[: len(tokens) // block_size * block_size]
    hashes, sha256 = [], hashlib.sha256
    for (block,) in struct.iter_unpack(f"{tokens.itemsize * block_size}s", whole.cast("B")):
        parent = sha256(parent + block).digest()
        hashes.append(parent)
    return hashes
