"""Paged attention on the GPU at hand: check against fp32, then time; JSON lines.

One call builds, checks and measures. Peers in the same call: torch SDPA flash and cuDNN over
contiguous KV (they are spared the block table); with --vllm FOLDER the FlashAttention-3 and the
unified Triton kernel of the vLLM installed there, over the same pool and block table; the device's
own copy rate as the floor of decode. Every call is timed in a CUDA graph of several, each over a
pool of its own that the L2 no longer holds: as an engine decodes, layer behind layer. With --sweep
every tile of a small grid is timed: the evidence for
worker/tilefleet_worker/attention/triton/tiles.py.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
import triton
from peers.attention import Call, PagedCase, contiguous, find_vllm, torch_calls, vllm_calls
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from tilefleet_worker.attention.triton.decode import DecodeWorkspace, paged_decode
from tilefleet_worker.attention.triton.prefill import paged_prefill, prefill_tiles
from tilefleet_worker.attention.triton.tiles import (
    PREFILL,
    DecodeTile,
    PrefillTile,
    architecture,
    decode_tile,
)

DECODES = [  # sequences, context, heads, KV heads, head dim
    (1, 8192, 32, 8, 128), (1, 131072, 32, 8, 128), (8, 4096, 32, 8, 128), (64, 8192, 32, 8, 128),
    (128, 32768, 32, 8, 128), (256, 1024, 32, 8, 128), (64, 8192, 64, 8, 128),
    (64, 8192, 16, 8, 128), (64, 8192, 32, 32, 128), (64, 8192, 14, 2, 64), (64, 1152, 32, 8, 128),
    (256, 1152, 32, 8, 128),
]  # fmt: skip
PREFILLS = [(1, 8192, 8192), (8, 4096, 4096), (16, 1024, 1024), (1, 2048, 32768), (4, 512, 8192)]
FOOTPRINT = 10**9  # bytes of the pools that the calls of one graph read, 20 times an H100's L2
REPLAYS = 9


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


def microseconds(calls: list[Call]) -> float:
    """Time of one call, median over the replays of a graph that makes them all.

    Captured, since an engine decodes so: the host's part of a launch (45 to 115 us from Python) is
    longer than the short cases, and the start of a graph (some 10 us) is a fair part of them.
    """
    calls[0]()  # compiled outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times) / len(calls) * 1e3


def copy_rate() -> float:
    """Bytes per second, read plus written, of a 2 GiB copy."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    # Not captured: a graph's copy node reaches 2.4 instead of 3.0 TB/s on an H100.
    milliseconds = do_bench(lambda: b.copy_(a), warmup=50, rep=200, return_mode="median")
    return 2 * a.numel() / milliseconds * 1e3


def inputs(
    seqs: int, new: int, context: int, heads: int, kv_heads: int, dim: int, block: int
) -> list[PagedCase]:  # fmt: skip
    """The case as often as its pools fill the footprint, at least once."""
    pages = seqs * triton.cdiv(context, block)
    shape = (pages, block, kv_heads, dim)
    count = -(-FOOTPRINT // (4 * pages * block * kv_heads * dim))

    def one() -> PagedCase:
        k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in "kv")
        ids = torch.randperm(pages, device="cuda").int().reshape(seqs, -1)
        q = torch.randn(seqs * new, heads, dim, dtype=torch.bfloat16, device="cuda")
        lens = torch.full((seqs,), context, dtype=torch.int32, device="cuda")
        return PagedCase(q, k, v, ids, lens, new, context)

    return [one() for _ in range(count)]


def peer_times(cases: list[PagedCase], with_vllm: bool) -> Iterator[tuple[str, float]]:
    """Microseconds of each peer that can run the case; a comment line for one that cannot."""
    makers: list[Callable[[PagedCase], dict[str, Call]]] = [torch_calls]
    for maker in [*makers, vllm_calls] if with_vllm else makers:
        each = [maker(case) for case in cases]
        for peer in each[0]:
            try:
                yield peer, microseconds([calls[peer] for calls in each])
            except Exception as error:  # peers refuse shapes by exceptions of all kinds
                print(f"# {peer}: {type(error).__name__} {str(error)[:100]}", flush=True)
        del each


def error_of(got: torch.Tensor, case: PagedCase) -> float:
    """Largest error against fp32 over the largest value: last new tokens of two sequences."""
    few = dataclasses.replace(case, table=case.table[:2])
    k, v = (contiguous(cache, few.table, case.context).float() for cache in (case.k, case.v))
    rows = min(case.new, 64)
    view = (len(case.lens), case.new, *case.q.shape[1:])
    q = case.q.reshape(view)[:2, -rows:].transpose(1, 2).float()
    position = torch.arange(case.context - rows, case.context, device="cuda")
    seen = torch.arange(case.context, device="cuda") <= position[:, None]
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    wrong = got.reshape(view)[:2, -rows:].transpose(1, 2).float() - want
    return (wrong.abs().max() / want.abs().max()).item()


def decode_calls(cases: list[PagedCase], tile: DecodeTile) -> list[Call]:
    """Ours, one call a pool, through one workspace as the layers of an engine."""
    seqs, (_, heads, dim), kv_heads = len(cases[0].lens), cases[0].q.shape, cases[0].k.shape[2]
    group, context = heads // kv_heads, cases[0].context
    work = DecodeWorkspace(seqs, kv_heads, group, dim, context, tile, "cuda")
    out = torch.empty_like(cases[0].q)
    return [
        lambda c=case: paged_decode(
            c.q, c.k, c.v, c.table, c.lens, out, work, tile, dim**-0.5
        )
        for case in cases
    ]  # fmt: skip


def prefill_calls(cases: list[PagedCase], tile: PrefillTile) -> list[Call]:
    """Ours, one call a pool."""
    seqs, new, context = len(cases[0].lens), cases[0].new, cases[0].context
    plan = prefill_tiles([new] * seqs, [context] * seqs, tile.rows, "cuda")
    out, scale = torch.empty_like(cases[0].q), cases[0].q.shape[2] ** -0.5
    return [
        lambda c=case: paged_prefill(c.q, c.k, c.v, c.table, plan, out, tile, scale)
        for case in cases
    ]


def measure(
    name: str, cases: list[PagedCase], candidates: list[tuple[object, list[Call]]],
    figure: Callable[[float], tuple[float, str, str | None, float | None]], with_peers: bool,
    with_vllm: bool,
) -> None:  # fmt: skip
    """Check and time ours, one row a tile; then the peers beside the last of them."""
    us, more = 0.0, {}
    for tile, calls in candidates:
        try:
            error = error_of(calls[0](), cases[0])
            us = microseconds(calls)
        except triton.runtime.errors.OutOfResources as problem:
            print(f"# {name} {tile}: {problem}", flush=True)
            continue
        if not error < 1e-2:
            sys.exit(f"{name} {tile}: error {error}")
        more = {"us": round(us, 1), "tile": list(dataclasses.astuple(tile))}  # type: ignore[call-overload]
        emit(name, *figure(us), **more)
    if with_peers:
        for peer, peer_us in peer_times(cases, with_vllm):
            emit(name, us, "us", peer, peer_us, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", choices=["decode", "prefill"], help="time a grid of tiles")
    parser.add_argument("--block", type=int, default=64, help="tokens a KV block (64)")
    parser.add_argument("--vllm", metavar="FOLDER", help="where vLLM lies, for its two kernels")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_attention: no GPU here, nothing measured", file=sys.stderr)
        return
    arch = architecture(torch.device("cuda", 0))
    why_not = find_vllm(args.vllm) if not args.sweep else "not part of a sweep"
    if why_not:
        print(f"# vLLM is no peer: {why_not}", flush=True)
    rate = copy_rate()
    emit("copy 2 GiB", rate / 1e9, "GB/s", None, None)
    peers = not args.sweep, not why_not
    sweep_decodes = [DECODES[i] for i in (0, 1, 2, 3, 9)]
    for seqs, context, heads, kv_heads, dim in (
        [] if args.sweep == "prefill" else sweep_decodes if args.sweep else DECODES
    ):
        cases = inputs(seqs, 1, context, heads, kv_heads, dim, args.block)
        tiles = swept_decode_tiles() if args.sweep else [decode_tile(arch, dim)]
        floor = 4 * seqs * context * kv_heads * dim / rate * 1e6
        measure(
            f"decode {seqs}x{context} heads {heads}/{kv_heads} d{dim} block {args.block}",
            cases, [(tile, decode_calls(cases, tile)) for tile in tiles],
            lambda us, floor=floor: (floor / us, "share of the copy rate", "copy", 1.0), *peers,
        )  # fmt: skip
    for seqs, new, context in (
        [] if args.sweep == "decode" else PREFILLS[:3] if args.sweep else PREFILLS
    ):
        cases = inputs(seqs, new, context, 32, 8, 128, args.block)[:4]
        swept = swept_prefill_tiles() if args.sweep else [PREFILL[arch]]
        flops = 4 * 32 * 128 * seqs * sum(range(context - new + 1, context + 1))
        measure(
            f"prefill {seqs}x{new} of {context} heads 32/8 d128 block {args.block}",
            cases, [(tile, prefill_calls(cases, tile)) for tile in swept],
            lambda us, flops=flops: (flops / us / 1e6, "TFLOP/s", None, None), *peers,
        )  # fmt: skip


def swept_decode_tiles() -> list[DecodeTile]:
    return [
        DecodeTile(tile, split, warps, stages, tma, registers)
        for tile in (32, 64)
        for split in (256, 512)
        for warps, stages, registers in ((4, 2, 0), (4, 3, 168), (8, 3, 128), (2, 3, 0))
        for tma in (False, True)
    ]


def swept_prefill_tiles() -> list[PrefillTile]:
    return [
        PrefillTile(rows, tile, warps, stages, tma)
        for rows, warps in ((128, 8), (64, 4))
        for tile in (32, 64)
        for stages in (2, 3)
        for tma in (False, True)
    ]


if __name__ == "__main__":
    COMMIT = commit()
    main()
