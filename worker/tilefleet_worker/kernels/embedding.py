"""Embedding of a step's tokens, some of which only the device knows yet."""

import torch
import triton
import triton.language as tl


@triton.jit
def embed_kernel(
    token_ptr, newest_ptr, table_ptr, out_ptr, FEATURES: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a token and BLOCK features."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < FEATURES
    token = tl.load(token_ptr + row)
    if token < 0:
        token = tl.load(newest_ptr - 1 - token)
    x = tl.load(table_ptr + token.to(tl.int64) * FEATURES + column, mask=ok, other=0.0)
    tl.store(out_ptr + row * FEATURES + column, x.to(out_ptr.dtype.element_ty), mask=ok)


def embed(
    token_ids: torch.Tensor, newest: torch.Tensor, table: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Rows of `table` for these tokens; a negative one stands for newest[-1 - token].

    token_ids: int32 [tokens]. newest: int32 [slots]. table: [vocabulary, features], contiguous.
    out: [tokens, features] of any floating type, contiguous; written and returned.
    """
    features = table.shape[1]
    block = min(1024, triton.next_power_of_2(features))
    embed_kernel[(len(token_ids), triton.cdiv(features, block))](
        token_ids, newest, table, out, FEATURES=features, BLOCK=block, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def embed_reference(
    token_ids: torch.Tensor, newest: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """The same from the definition, in the table's type."""
    pending = token_ids < 0
    named = torch.where(pending, newest[torch.where(pending, -1 - token_ids, 0).long()], token_ids)
    return table[named.long()]
