"""Norm of queries and keys, rotary embedding and KV store in one launch.

Rotary: element i of a head's first half turns with element i of its second half, the layout of
checkpoints in Hugging Face format (Su et al., 2021). Keys and values go straight to their cache
slots; queries go to a tensor of their own.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MOST_TOGETHER = 8
"""Heads of a program. With one, 8,192 tokens of the 8B shape took 243 µs, their bytes 66 (H100)."""


@triton.jit
def rotary_store_kernel(
    qkv_ptr, position_ptr, slot_ptr, table_ptr, q_norm_ptr, k_norm_ptr, q_ptr, k_ptr, v_ptr, eps,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TOGETHER: tl.constexpr, DIM: tl.constexpr,
    ROTATED: tl.constexpr, HALF_PAD: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, (heads + 2 · kv heads) / TOGETHER); a program has heads of one kind."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * TOGETHER
    h = tl.arange(0, TOGETHER)[:, None]
    source = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head + h) * DIM
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if (head >= HEADS) & (slot < 0):  # a padding row of a captured graph belongs to nobody
        return
    page, place = slot // BLOCK, slot % BLOCK
    if head >= HEADS + KV_HEADS:
        d = tl.arange(0, DIM_PAD)[None, :]
        value = tl.load(source + d, mask=d < DIM, other=0.0)
        target = page * stride_vb + place * stride_vt + (head - HEADS - KV_HEADS + h) * stride_vh
        tl.store(v_ptr + target + d, value.to(v_ptr.dtype.element_ty), mask=d < DIM)
        return
    half = ROTATED // 2
    i = tl.arange(0, HALF_PAD)[None, :]
    ok = i < half
    rest = ROTATED + tl.arange(0, DIM_PAD)[None, :]  # dimensions that are not rotated
    rest_ok = rest < DIM
    first = tl.load(source + i, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source + half + i, mask=ok, other=0.0).to(tl.float32)
    if ROTATED < DIM:
        kept = tl.load(source + rest, mask=rest_ok, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first + second * second, 1)
        if ROTATED < DIM:
            square += tl.sum(kept * kept, 1)
        scale = tl.rsqrt(square / DIM + eps)[:, None]
        weight = k_norm_ptr if head >= HEADS else q_norm_ptr
        first *= scale * tl.load(weight + i, mask=ok, other=0.0).to(tl.float32)
        second *= scale * tl.load(weight + half + i, mask=ok, other=0.0).to(tl.float32)
        if ROTATED < DIM:
            kept *= scale * tl.load(weight + rest, mask=rest_ok, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + token).to(tl.int64)
    cos = tl.load(table_ptr + position * ROTATED + i, mask=ok, other=0.0)
    sin = tl.load(table_ptr + position * ROTATED + half + i, mask=ok, other=0.0)
    turned_first, turned_second = first * cos - second * sin, second * cos + first * sin
    # No pointer that is one or the other: for AMD the compiler cannot merge one into a pool of
    # 2 GiB or more with one into a small tensor (Triton 3.9).
    kind = q_ptr.dtype.element_ty
    if head >= HEADS:
        key = k_ptr + page * stride_kb + place * stride_kt + (head - HEADS + h) * stride_kh
        tl.store(key + i, turned_first.to(kind), mask=ok)
        tl.store(key + half + i, turned_second.to(kind), mask=ok)
        if ROTATED < DIM:
            tl.store(key + rest, kept.to(kind), mask=rest_ok)
    else:
        query = q_ptr + (token * HEADS + head + h) * DIM
        tl.store(query + i, turned_first.to(kind), mask=ok)
        tl.store(query + half + i, turned_second.to(kind), mask=ok)
        if ROTATED < DIM:
            tl.store(query + rest, kept.to(kind), mask=rest_ok)


@dataclass(frozen=True, slots=True)
class Rotation:
    """What the fused kernel needs beside its tensors."""

    table: torch.Tensor  # fp32 [positions, rotated dims]: cosines of the pairs, then sines
    eps: float
    """Of the norm of queries and keys."""
    q_norm: torch.Tensor | None = None  # [head_dim]; None: no norm
    k_norm: torch.Tensor | None = None


def rotary_table(
    inverse_frequencies: torch.Tensor, max_positions: int, scale: float = 1.0
) -> torch.Tensor:
    """Cosines and sines fp32 [max_positions, 2 · pairs] of frequencies fp64 [pairs]."""
    positions = torch.arange(max_positions, dtype=torch.float64, device=inverse_frequencies.device)
    angles = torch.outer(positions, inverse_frequencies)
    return (torch.cat((angles.cos(), angles.sin()), 1) * scale).float()


def rotary_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rotation: Rotation,
    query: torch.Tensor,
    cache: torch.Tensor,
) -> torch.Tensor:
    """Write rotated queries to `query`, rotated keys and plain values to their slots of `cache`.

    qkv: [tokens, (heads + 2 · kv_heads) · head_dim], contiguous. positions: int32 [tokens]. slots:
    int32 [tokens], block · block_size + place; -1 stores nothing. query: [tokens, heads, head_dim].
    cache: [2, blocks, block_size, kv_heads, head_dim] of query's type. Returns query.
    """
    tokens, heads, dim = query.shape
    keys, values = cache.unbind(0)
    block, kv_heads = keys.shape[1:3]
    norm = rotation.q_norm is not None
    rotated = rotation.table.shape[1]
    # Always as many, so that bits do not depend on the number of tokens.
    together = math.gcd(heads, kv_heads, MOST_TOGETHER)
    rotary_store_kernel[(tokens, (heads + 2 * kv_heads) // together)](
        qkv, positions, slots, rotation.table,
        rotation.q_norm if norm else query, rotation.k_norm if norm else query,
        query, keys, values, rotation.eps, *keys.stride()[:3], *values.stride()[:3],
        HEADS=heads, KV_HEADS=kv_heads, TOGETHER=together, DIM=dim, ROTATED=rotated,
        HALF_PAD=triton.next_power_of_2(rotated // 2), DIM_PAD=triton.next_power_of_2(dim),
        BLOCK=block, NORM=norm, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return query


def rotary_reference(
    heads: torch.Tensor, positions: torch.Tensor, rotation: Rotation, norm: torch.Tensor | None
) -> torch.Tensor:
    """Normed and rotated heads [tokens, heads, head_dim] from the definition, in fp64."""
    x = heads.double()
    if norm is not None:
        x = x * (x.pow(2).mean(-1, keepdim=True) + rotation.eps).rsqrt() * norm.double()
    cos, sin = rotation.table[positions.long()].double()[:, None].chunk(2, -1)
    rotated = rotation.table.shape[1]
    first, second = x[..., :rotated].chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin, x[..., rotated:])
    return torch.cat(turned, -1)
