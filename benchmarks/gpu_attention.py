"""Paged attention on the GPU at hand: check against fp32, then time; JSON lines.

One call builds, checks and measures. Peers in the same run: torch SDPA flash and cuDNN over
contiguous KV (they are spared the block table), and the device's own copy rate as the floor of
decode. With --sweep every tile of a small grid is timed: the evidence for
worker/tilefleet_worker/attention/triton/tiles.py.
"""

import argparse
import json
import subprocess
import sys

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from tilefleet_worker.attention.triton.decode import DecodeWorkspace, paged_decode
from tilefleet_worker.attention.triton.prefill import paged_prefill, prefill_tiles
from tilefleet_worker.attention.triton.tiles import (
    PREFILL,
    DecodeTile,
    PrefillTile,
    decode_tile,
)

DECODES = [  # sequences, context, heads, KV heads, head dim
    (1, 8192, 32, 8, 128), (1, 131072, 32, 8, 128), (8, 4096, 32, 8, 128), (64, 8192, 32, 8, 128),
    (128, 32768, 32, 8, 128), (256, 1024, 32, 8, 128), (64, 8192, 64, 8, 128),
    (64, 8192, 16, 8, 128), (64, 8192, 32, 32, 128), (64, 8192, 14, 2, 64), (64, 1152, 32, 8, 128),
    (256, 1152, 32, 8, 128),
]  # fmt: skip
PREFILLS = [(1, 8192, 8192), (8, 4096, 4096), (16, 1024, 1024), (1, 2048, 32768), (4, 512, 8192)]


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def emit(
    case: str, value: float, unit: str, peer: str | None, peer_value: float | None, **more: object
) -> None:  # fmt: skip
    row = {
        "bench": "gpu_attention",
        "case": case,
        "value": round(value, 4),
        "unit": unit,
        "peer": peer,
    }
    ratio = round(value / peer_value, 4) if peer_value else None
    row |= {"peer_value": peer_value and round(peer_value, 4), "ratio": ratio, **more}
    row |= {
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__} triton {triton.__version__}",
    }
    print(json.dumps(row | {"commit": COMMIT}), flush=True)


def microseconds(call) -> float:
    """Median time of one replay of the captured call, the L2 flushed before each.

    Captured, since an engine decodes so: the host's part of a launch (45 to 115 us from Python) is
    longer than the short cases themselves and would be measured in their place.
    """
    call()  # compiled outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, warmup=50, rep=200, return_mode="median") * 1e3


def copy_rate() -> float:
    """Bytes per second, read plus written, of a 2 GiB copy."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    # Not captured: a graph's copy node reaches 2.4 instead of 3.0 TB/s on an H100.
    milliseconds = do_bench(lambda: b.copy_(a), warmup=50, rep=200, return_mode="median")
    return 2 * a.numel() / milliseconds * 1e3


def pool(seqs: int, context: int, kv_heads: int, dim: int, block: int):
    pages = seqs * triton.cdiv(context, block)
    ids = torch.randperm(pages, device="cuda").int().reshape(seqs, -1)
    shape = (pages, block, kv_heads, dim)
    k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in "kv")
    return k, v, ids


def contiguous(cache, ids, context):
    """[seqs, kv heads, context, dim] of one cache."""
    return cache[ids.long()].flatten(1, 2)[:, :context].transpose(1, 2).contiguous()


def peers(q, k, v, causal: bool):
    """Best of torch's flash and cuDNN attention, microseconds. q: [seqs, heads, queries, dim]."""
    best = {}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        try:
            with sdpa_kernel(backend):
                best[name] = microseconds(
                    lambda: F.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, enable_gqa=True
                    )
                )
        except RuntimeError as error:
            print(f"# {name}: {str(error)[:100]}", flush=True)
    return best


def decode_case(case, block: int, rate: float, tiles: list[DecodeTile], with_peers: bool) -> None:
    seqs, context, heads, kv_heads, dim = case
    k, v, ids = pool(seqs, context, kv_heads, dim, block)
    q = torch.randn(seqs, heads, dim, dtype=torch.bfloat16, device="cuda")
    lens = torch.full((seqs,), context, dtype=torch.int32, device="cuda")
    name = f"decode {seqs}x{context} heads {heads}/{kv_heads} d{dim} block {block}"
    floor = k.numel() * 2 * 2 / rate * 1e6
    best = {}
    if with_peers:
        kc, vc = contiguous(k, ids, context), contiguous(v, ids, context)
        best = peers(q[:, :, None], kc, vc, False)
        with sdpa_kernel(SDPBackend.MATH):
            want = F.scaled_dot_product_attention(
                q[:2, :, None].float(), kc[:2].float(), vc[:2].float(), enable_gqa=True
            )[:, :, 0]
        del kc, vc
    for tile in tiles or [decode_tile("sm90", dim)]:
        work = DecodeWorkspace(seqs, kv_heads, heads // kv_heads, dim, context, tile, "cuda")
        out = torch.empty_like(q)
        try:
            us = microseconds(
                lambda t=tile, w=work, o=out: paged_decode(q, k, v, ids, lens, o, w, t, dim**-0.5)
            )
        except triton.runtime.errors.OutOfResources as error:
            print(f"# {name} {tile}: {error}", flush=True)
            continue
        if with_peers:
            error = (out[:2].float() - want).abs().max().item() / want.abs().max().item()
            if error > 1e-2:
                sys.exit(f"{name} {tile}: error {error}")
        more = {"us": round(us, 1), "tile": [tile.tile, tile.split, tile.warps, tile.stages]}
        emit(name, floor / us, "share of the copy rate", "copy", 1.0, **more)
        for peer, peer_us in best.items():
            emit(name, us, "us", f"torch sdpa {peer}", peer_us, **more)


def prefill_case(case, block: int, tiles: list[PrefillTile], with_peers: bool) -> None:
    seqs, new, context = case
    heads, kv_heads, dim = 32, 8, 128
    k, v, ids = pool(seqs, context, kv_heads, dim, block)
    q = torch.randn(seqs * new, heads, dim, dtype=torch.bfloat16, device="cuda")
    flops = 4 * heads * dim * seqs * sum(context - new + i + 1 for i in range(new))
    name = f"prefill {seqs}x{new} of {context} heads 32/8 d128 block {block}"
    best, want = {}, None
    if with_peers and new == context:
        qc = q.reshape(seqs, new, heads, dim).transpose(1, 2).contiguous()
        kc, vc = contiguous(k, ids, context), contiguous(v, ids, context)
        best = peers(qc, kc, vc, True)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            want = F.scaled_dot_product_attention(
                qc, kc, vc, is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        del qc, kc, vc
    for tile in tiles:
        plan = prefill_tiles([new] * seqs, [context] * seqs, tile.rows, "cuda")
        out = torch.empty_like(q)
        try:
            us = microseconds(
                lambda p=plan, t=tile, o=out: paged_prefill(q, k, v, ids, p, o, t, dim**-0.5)
            )
        except triton.runtime.errors.OutOfResources as error:
            print(f"# {name} {tile}: {error}", flush=True)
            continue
        if want is not None:
            error = (out.reshape(want.shape).float() - want.float()).abs().max().item()
            if error > 5e-2:
                sys.exit(f"{name} {tile}: error {error}")
        more = {"us": round(us, 1), "tile": [tile.rows, tile.tile, tile.warps, tile.stages]}
        emit(name, flops / us / 1e6, "TFLOP/s", None, None, **more)
        for peer, peer_us in best.items():
            emit(name, us, "us", f"torch sdpa {peer}", peer_us, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", choices=["decode", "prefill"], help="time a grid of tiles")
    parser.add_argument("--block", type=int, default=64, help="tokens a KV block (64)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_attention: no GPU here, nothing measured", file=sys.stderr)
        return
    decode_tiles: list[DecodeTile] = []  # the table's
    prefill_tiles_ = [PREFILL["sm90"]]
    if args.sweep:
        decode_tiles = [
            DecodeTile(tile, split, warps, stages, tma, registers)
            for tile in (32, 64)
            for split in (256, 512)
            for warps, stages, registers in ((4, 2, 0), (4, 3, 168), (8, 3, 128), (2, 3, 0))
            for tma in (False, True)
        ]  # fmt: skip
        prefill_tiles_ = [
            PrefillTile(r, t, w, g, tma)
            for r, w in ((128, 8), (64, 4)) for t in (32, 64)
            for g in (2, 3) for tma in (False, True)
        ]  # fmt: skip
    rate = copy_rate()
    emit("copy 2 GiB", rate / 1e9, "GB/s", None, None)
    if args.sweep != "prefill":
        for case in [DECODES[i] for i in (0, 1, 2, 3, 9)] if args.sweep else DECODES:
            decode_case(case, args.block, rate, decode_tiles, not args.sweep)
    if args.sweep != "decode":
        for case in PREFILLS[:2] if args.sweep else PREFILLS:
            prefill_case(case, args.block, prefill_tiles_, not args.sweep)


if __name__ == "__main__":
    COMMIT = commit()
    main()
