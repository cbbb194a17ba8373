"""Variants of the kernels at both ends of a step: embedding, and from logits to tokens.

Shape: the vocabulary of Qwen3, 151,936 tokens, the largest but one of the families.
"""

from collections.abc import Iterator
from typing import Any

import triton

from tilefleet_worker.compilation.variant import Variant
from tilefleet_worker.kernels.embedding import embed_kernel
from tilefleet_worker.kernels.sampling import (
    CAPACITY,
    CHUNK,
    OPTIONS,
    STEP,
    choose_kernel,
    chunk_best_kernel,
    chunk_weight_kernel,
)

_SINGLE, _DOUBLE, _INDEX = "*fp32", "*fp64", "*i32"
_VOCABULARY, _HIDDEN = 151_936, 4096
_CHUNKS = triton.next_power_of_2(triton.cdiv(_VOCABULARY, CHUNK))


def sampling_variants(arch: str) -> Iterator[Variant]:
    """All variants of an architecture."""
    yield Variant(
        embed_kernel, "embed", f"{_HIDDEN} features", arch,
        {"token_ptr": _INDEX, "newest_ptr": _INDEX, "table_ptr": "*bf16", "out_ptr": _SINGLE},
        {"FEATURES": _HIDDEN, "BLOCK": 1024}, {"num_warps": 4, "enable_fp_fusion": True},
    )  # fmt: skip
    sizes = {"CHUNK": CHUNK, "CHUNKS": _CHUNKS}
    inputs = {"logits_ptr": _SINGLE, "word_ptr": _INDEX, "best_ptr": _SINGLE, "vocab": "i32"}
    pairs = {"pair_ptr": _DOUBLE, "weight_ptr": _DOUBLE}
    chosen: dict[str, Any] = {
        "seed_ptr": "*i64", "id_ptr": _INDEX, "near_ptr": _SINGLE, "near_id_ptr": _INDEX,
        "token_ptr": _INDEX, "newest_ptr": _INDEX,
    }  # fmt: skip
    bounds = {"CAPACITY": CAPACITY, "BLOCK": CHUNK, "STEP": STEP}
    for kernel, types, constants in (
        (chunk_best_kernel, inputs | {"id_ptr": _INDEX}, sizes),
        (chunk_weight_kernel, inputs | pairs, sizes),
        (choose_kernel, inputs | pairs | chosen, sizes | bounds),
    ):
        name = kernel.__name__
        yield Variant(
            kernel, name.removesuffix("_kernel"), f"{_VOCABULARY} tokens", arch,
            types, constants, OPTIONS[name],
        )  # fmt: skip
