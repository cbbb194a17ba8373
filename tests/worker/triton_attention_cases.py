"""Cases of paged attention against an fp64 oracle; run by the interpreter test and on a GPU.

python triton_attention_cases.py decode|prefill|invariance. The device is a GPU unless
TRITON_INTERPRET=1.
"""

import itertools
import os
import sys

import torch

from tilefleet_worker.attention.triton.decode import DecodeWorkspace, paged_decode
from tilefleet_worker.attention.triton.prefill import paged_prefill, prefill_tiles
from tilefleet_worker.attention.triton.tiles import DecodeTile, PrefillTile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
# fp32: rounding of sums over ≤ 400 keys. bf16: one rounding of p (2^-9), one of the result (2^-9).
TOLERANCE = 2e-5 if INTERPRETED else 2**-8 * 1.5


def pool(contexts, kv_heads, dim, block, seed=0):
    """A shuffled block table over a pool that holds garbage wherever no sequence wrote."""
    gen = torch.Generator().manual_seed(seed)
    need = [-(-c // block) for c in contexts]
    ids = torch.randperm(sum(need) + 3, generator=gen)
    table = torch.full((len(contexts), max([*need, 1])), 0, dtype=torch.int32)
    k = torch.randn(len(ids), block, kv_heads, dim, generator=gen).to(DTYPE)
    v = torch.randn(len(ids), block, kv_heads, dim, generator=gen).to(DTYPE)
    at = 0
    for row, count in enumerate(need):
        table[row, :count] = ids[at : at + count].int()
        at += count
    k[ids[at:]] = 1e4  # never to be read
    v[ids[at:]] = float("nan")
    return k, v, table


def oracle(q, k, v, table, queries, contexts, scale, window, softcap, sinks):
    """fp64 attention, one sequence and head at a time. q: [tokens, heads, dim]."""
    out, row0, block, group = (
        torch.zeros_like(q, dtype=torch.float64),
        0,
        k.shape[1],
        q.shape[1] // k.shape[2],
    )
    for seq, (n, c) in enumerate(zip(queries, contexts, strict=True)):
        pages = table[seq, : -(-c // block)].long()
        keys = k[pages].flatten(0, 1)[:c].double().repeat_interleave(group, 1)
        values = v[pages].flatten(0, 1)[:c].double().repeat_interleave(group, 1)
        s = torch.einsum("qhd,khd->hqk", q[row0 : row0 + n].double(), keys) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        pos, key = torch.arange(c - n, c)[:, None], torch.arange(c)[None, :]
        seen = (key <= pos) & ((key > pos - window) if window else True)
        s = s.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.double()[:, None, None].expand(-1, n, 1)], -1)
        p = torch.softmax(s, -1)[..., :c]
        out[row0 : row0 + n] = torch.einsum("hqk,khd->qhd", p, values)
        row0 += n
    return out


def close(got, want, name):
    error = ((got.double().cpu() - want).abs() / want.abs().clamp_min(1.0)).max().item()
    if not error <= TOLERANCE:
        sys.exit(f"{name}: error {error:.2e} > {TOLERANCE:.2e}")


def run_decode(q, k, v, table, contexts, tile, scale, window=0, softcap=0.0, sinks=None):
    most = max(contexts)
    work = DecodeWorkspace(
        len(contexts), k.shape[2], q.shape[1] // k.shape[2], q.shape[2], most, tile, DEVICE
    )
    args = [x.to(DEVICE) for x in (q, k, v, table, torch.tensor(contexts, dtype=torch.int32))]
    sinks = None if sinks is None else sinks.to(DEVICE)
    outs = [
        paged_decode(
            *args,
            torch.empty_like(args[0]),
            work,
            tile,
            scale,
            window,
            softcap,
            sinks,
            programs,
        )
        for programs in (
            2048,
            1,
        )  # the second takes splits in turns, and finds the counters at zero
    ]
    if not torch.equal(outs[0], outs[1]):
        sys.exit("decode: a second launch gave other bits")
    return outs[0].cpu()


GQA = [(4, 4), (8, 2), (14, 2), (3, 1)]
VARIANTS = [(0, 0.0, False), (33, 0.0, False), (0, 20.0, True), (17, 0.0, True)]


def variants(index):
    """All of them on a GPU; two a shape, all over the shapes, where a case takes seconds."""
    return VARIANTS if not INTERPRETED else VARIANTS[index % 2 :: 2]


def decode():
    count = 0
    shapes = itertools.product(GQA, [64, 80], [16, 64]) if not INTERPRETED else [
        (GQA[0], 64, 16), (GQA[1], 128, 64), (GQA[2], 64, 32), (GQA[3], 80, 16), (GQA[1], 256, 16)
    ]  # fmt: skip
    for index, ((heads, kv_heads), dim, block) in enumerate(shapes):
        # descriptors where the block and the dimension allow them, pointers elsewhere
        tile = DecodeTile(16, 64, 4, 1, tma=index % 2 == 0)
        contexts = [1, 65, 130] if INTERPRETED else [1, 16, 65, 200, 3000]
        k, v, table = pool(contexts, kv_heads, dim, block)
        q = torch.randn(len(contexts), heads, dim, generator=torch.Generator().manual_seed(1)).to(
            DTYPE
        )
        for window, softcap, sink in variants(index):
            sinks = torch.linspace(-2, 2, heads) if sink else None
            got = run_decode(q, k, v, table, contexts, tile, dim**-0.5, window, softcap, sinks)
            want = oracle(
                q, k, v, table, [1] * len(contexts), contexts, dim**-0.5, window, softcap, sinks
            )
            close(
                got,
                want,
                f"decode {heads}/{kv_heads} d{dim} block {block} {window} {softcap} {sink}",
            )
            count += 1
    print(f"checked {count} decode cases")


def prefill():
    count = 0
    shapes = [(GQA[0], 64, 16), (GQA[1], 128, 64), (GQA[2], 64, 32), (GQA[3], 80, 16)]
    for index, ((heads, kv_heads), dim, block) in enumerate(shapes):
        if INTERPRETED:
            tile = PrefillTile(32, 16, 4, 1, tma=index % 2 == 0)
        else:
            tile = PrefillTile(64, 64, 4, 3, tma=True)
        queries, contexts = [1, 0, 37, 20], [1, 5, 37, 60]
        k, v, table = pool(contexts, kv_heads, dim, block)
        q = torch.randn(sum(queries), heads, dim, generator=torch.Generator().manual_seed(1)).to(
            DTYPE
        )
        for window, softcap, sink in variants(index):
            sinks = torch.linspace(-2, 2, heads) if sink else None
            tiles = prefill_tiles(queries, contexts, tile.rows, DEVICE)
            got = paged_prefill(
                q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), table.to(DEVICE), tiles,
                torch.empty_like(q, device=DEVICE), tile, dim**-0.5, window, softcap,
                None if sinks is None else sinks.to(DEVICE),
            ).cpu()  # fmt: skip
            want = oracle(q, k, v, table, queries, contexts, dim**-0.5, window, softcap, sinks)
            close(
                got,
                want,
                f"prefill {heads}/{kv_heads} d{dim} block {block} {window} {softcap} {sink}",
            )
            count += 1
    print(f"checked {count} prefill cases")


def invariance():
    """One sequence alone and among others: the same bits, decode and chunked prefill."""
    tile, rows = DecodeTile(16, 64, 4, 1), PrefillTile(32, 16, 4, 1)
    contexts = [90, 130, 7]
    k, v, table = pool(contexts, 2, 64, 16)
    q = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    batch = run_decode(q, k, v, table, contexts, tile, 0.125)
    for i, context in enumerate(contexts):
        alone = run_decode(q[i : i + 1], k, v, table[i : i + 1], [context], tile, 0.125)
        if not torch.equal(alone[0], batch[i]):
            sys.exit(f"decode: sequence {i} has other bits in a batch")
    q = torch.randn(90, 8, 64, generator=torch.Generator().manual_seed(2)).to(DTYPE)
    dev = [x.to(DEVICE) for x in (k, v, table[:1])]

    def chunk(a, b):
        part = q[a:b].contiguous().to(DEVICE)
        tiles = prefill_tiles([b - a], [b], rows.rows, DEVICE)
        return paged_prefill(part, *dev, tiles, torch.empty_like(part), rows, 0.125).cpu()

    whole = chunk(0, 90)
    # the interpreter multiplies with BLAS, whose bits depend on a row's place: cut whole tiles
    for cut in (32, 64) if INTERPRETED else (16, 32, 47, 89):
        if not torch.equal(torch.cat([chunk(0, cut), chunk(cut, 90)]), whole):
            sys.exit(f"prefill: cut at {cut} changed bits")
    print("checked invariance")


if __name__ == "__main__":
    {"decode": decode, "prefill": prefill, "invariance": invariance}[sys.argv[1]]()
