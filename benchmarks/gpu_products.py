"""Few-row products on the GPU at hand beside the library's: checked, then timed; JSON lines.

Every tile is checked against fp64 first, then timed in captured graphs that cycle through copies of
the weights which the L2 cache cannot hold. `share`: weight bytes over time, over the copy rate
measured in the same call. --sweep tries every candidate; without it, the tile table's.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from tilefleet_worker.kernels import products
from tilefleet_worker.kernels.norm import add_rms_norm
from tilefleet_worker.kernels.product_tiles import GROUP, TILES, ProductTile
from tilefleet_worker.kernels.products import (
    Operands,
    Products,
    ProductShape,
    Stream,
    normed_reference,
)
from tilefleet_worker.kernels.swiglu import swiglu

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# name: kind, output features, inner dimension
SHAPES = {
    "llama-3.1-8b": {
        "qkv": ("normed", 6144, 4096), "output": ("add", 4096, 4096),
        "gate_up": ("gated", 14336, 4096), "down": ("add", 4096, 14336),
        "head": ("logits", 128256, 4096),
    },
    "qwen3-0.6b": {
        "qkv": ("normed", 4096, 1024), "output": ("add", 1024, 2048),
        "gate_up": ("gated", 3072, 1024), "down": ("add", 1024, 3072),
        "head": ("logits", 151936, 1024),
    },
}  # fmt: skip
LAYERS = {"llama-3.1-8b": 8, "qwen3-0.6b": 28}  # of the chain: more than the L2 cache holds
# rows of a tile, columns, depth, warps, stages; each by TMA and without
FEW = (
    (16, 64, 128, 4, 4), (16, 64, 128, 4, 5), (16, 64, 64, 4, 8), (16, 64, 256, 4, 3),
    (16, 32, 256, 4, 5),
)  # fmt: skip
SOME = (
    (64, 64, 64, 4, 6), (64, 64, 128, 4, 4), (64, 64, 128, 4, 3), (64, 128, 64, 8, 6),
    (64, 128, 64, 4, 5), (64, 32, 128, 4, 4),
)  # fmt: skip
MANY = (
    (256, 128, 64, 8, 4), (256, 128, 64, 8, 3), (256, 64, 64, 4, 4), (256, 64, 64, 8, 5),
    (128, 128, 64, 8, 4), (128, 128, 64, 8, 6), (128, 256, 64, 8, 4), (128, 64, 64, 4, 4),
    (128, 64, 128, 4, 4),
)  # fmt: skip
SHARED_BYTES = 227 << 10
Job = tuple[str, int, ProductTile]


def emit(case: str, **values: Any) -> None:
    print(json.dumps({"bench": "gpu_products", "case": case, **values}), flush=True)


class Case:
    """One product on the device: `copies` weights, inputs of some rows, outputs."""

    def __init__(self, kind: str, features: int, inner: int, rows: int, copies: int) -> None:
        torch.manual_seed(rows)
        self.kind, self.shape, self.rows = kind, (features, inner), rows
        height = features * (2 if kind == "gated" else 1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, device=DEVICE).normal_()

        self.weights = [normal(height, inner).mul_(inner**-0.5) for _ in range(copies)]
        self.norm = normal(max(features, inner))
        self.x = Stream.empty(rows, inner, torch.bfloat16, torch.device(DEVICE))
        self.x.residual.normal_()
        self.x.scaled.copy_(self.x.residual * self.norm[:inner])
        padded = torch.zeros(rows, -(-inner // GROUP) * GROUP, device=DEVICE)
        padded[:, :inner] = self.x.residual.square()
        self.x.squares.copy_(padded.view(rows, -1, GROUP).sum(-1))
        kind_out = torch.float32 if kind == "logits" else torch.bfloat16
        self.out = torch.empty(rows, features, dtype=kind_out, device=DEVICE)
        self.stream = Stream.empty(rows, features, torch.bfloat16, torch.device(DEVICE))
        self.stream.residual.zero_()
        self.partial = torch.empty(16 * (features + 256) * 2 * max(16, rows), device=DEVICE)
        self.counters = torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)

    def run(self, tile: ProductTile, index: int = 0) -> None:
        """Launch ours on one of the weights."""
        weight, compute = self.weights[index], products.compute_type(torch.bfloat16)
        if self.kind == "add":
            norm = self.norm[: self.shape[0]]
            operands = Operands(
                self.x.scaled, weight, self.stream.scaled, stream=self.stream, norm=norm
            )
        else:
            gated = self.kind == "gated"
            operands = Operands(self.x.scaled, weight, self.out, self.x.squares, gated=gated)
        products.launch(tile, operands, EPS, self.partial, self.counters, compute)

    def library(self, index: int = 0) -> None:
        """The product alone, as the library does it."""
        if self.kind == "logits":
            torch.ops.aten.mm.dtype_out(
                self.x.scaled, self.weights[index].t(), torch.float32, out=self.out
            )
            return
        wide = self.kind == "gated"
        out = self.partial.view(torch.bfloat16)[: self.rows * self.shape[0] * (2 if wide else 1)]
        torch.mm(self.x.scaled, self.weights[index].t(), out=out.view(self.rows, -1))

    def error(self, tile: ProductTile) -> float:
        """Largest error over the larger of 1 and the value, against fp64."""
        self.stream.residual.zero_()
        self.run(tile)
        weight = self.weights[0].double()
        if self.kind == "add":
            want = self.x.scaled.double() @ weight.t()
            squares = self.stream.residual.double().square().sum(1)
            kept = (self.stream.squares.double().sum(1) / squares - 1).abs().max().item()
            scaled = want * self.norm[: self.shape[0]].double()
            return max(
                kept, relative(self.stream.residual, want), relative(self.stream.scaled, scaled)
            )
        want = normed_reference(self.x.residual, self.norm[: self.shape[1]], EPS) @ weight.t()
        if self.kind == "gated":
            gate, up = want.chunk(2, -1)
            want = gate * torch.sigmoid(gate) * up
        return relative(self.out, want)

    def bits(self, tile: ProductTile) -> torch.Tensor:
        """The product alone, before anything is rounded where it adds to the stream."""
        self.stream.residual.zero_()
        self.run(tile)
        return (self.stream.residual if self.kind == "add" else self.out).clone()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).abs() / want.abs().clamp_min(1.0)).max().item()


def seconds(call: Callable[[], object], times: int = 5) -> float:
    """Median seconds of a call on the device."""
    call()
    spans = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in spans)) / 1e3


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def per_launch(run: Callable[[int], object], copies: int, launches: int) -> float:
    """Seconds of one launch in a graph of many that cycles through the copies."""

    def all_launches() -> None:
        for i in range(launches):
            run(i % copies)

    return seconds(captured(all_launches).replay) / launches


def copy_rate() -> float:
    """Bytes per second, read plus written."""
    a = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a), 10)


def candidates(kind: str, features: int, inner: int, rows: int) -> Iterator[ProductTile]:
    """Tiles worth trying: they fit shared memory and give between 64 and 1100 programs."""
    for tile_rows, columns, depth, warps, stages in (
        FEW if rows <= 16 else SOME if rows <= 64 else MANY
    ):
        wide = 2 if kind == "gated" else 1
        if stages * depth * 2 * (columns * wide + tile_rows) > SHARED_BYTES:
            continue
        if columns * wide * tile_rows > warps * 4096:
            continue
        programs = -(-features // columns) * -(-rows // tile_rows)
        for splits in (1, 2, 4):
            if splits == 1 or (programs * splits <= 264 and splits * 256 <= inner):
                yield ProductTile(tile_rows, columns, depth, splits, warps, stages, tma=True)


def check(job: Job) -> dict[str, Any]:
    """Compile a tile and run it on a small matrix whose edges no tile meets. Any process."""
    kind, inner, tile = job
    try:
        case = Case(kind, 2 * tile.columns + 16, inner, tile.rows - 3, 1)
        error = case.error(tile)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return {"job": job, "error": None, "said": traceback.format_exc()[-300:]}
    return {"job": job, "error": error}


def check_all(jobs: list[Job]) -> set[tuple[Any, ...]]:
    """Jobs that give the right values. Compiles in many processes; they share Triton's cache."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(14, mp_context=context) as pool:
        found = list(pool.map(check, jobs, chunksize=4))
    bad = [one for one in found if one["error"] is None or one["error"] > 2**-5]
    worst = max((one["error"] for one in found if one["error"] is not None), default=None)
    emit("check tiles", jobs=len(jobs), bad=len(bad), worst_error=worst, first_bad=repr(bad[:3]))
    wrong = {one["job"] for one in bad}
    return {_compiled(job) for job in jobs if job not in wrong}


def _compiled(job: Job) -> tuple[Any, ...]:
    """What tells one compilation from another: the number of splits does not."""
    kind, inner, tile = job
    groups = inner if kind != "add" else 0
    return kind, groups, replace(tile, splits=min(2, tile.splits))


def sweep(model: str, rate: float, row_counts: tuple[int, ...], good: set[tuple[Any, ...]]) -> None:
    for name, (kind, features, inner) in SHAPES[model].items():
        size = features * inner * 2 * (2 if kind == "gated" else 1)
        copies = max(1, min(64, -(-(300 << 20) // size)))
        launches = copies * max(1, 10 // copies)
        for rows in row_counts:
            case = Case(kind, features, inner, rows, copies)
            library = per_launch(case.library, copies, launches)
            found = []
            for tile in (
                TILES["sm90"].of(rows, features, inner, kind == "gated"),
                *candidates(kind, features, inner, rows),
            ):
                if _compiled((kind, inner, tile)) not in good:
                    continue
                try:
                    span = per_launch(lambda i: case.run(tile, i), copies, launches)  # noqa: B023
                except Exception:
                    said = traceback.format_exc()[-300:]
                    emit(f"failed {model} {name}", tile=repr(tile), said=said)
                    continue
                found.append((span, tile))
            found.sort(key=lambda pair: pair[0])
            emit(
                f"sweep {model} {name} rows {rows}", library_us=round(library * 1e6, 2),
                library_share=round(size / rate / library, 3),
                best=[
                    [round(span * 1e6, 2), round(size / rate / span, 3),
                     t.rows, t.columns, t.depth, t.splits, t.warps, t.stages, t.tma]
                    for span, t in found[:9]
                ],
            )  # fmt: skip
            torch.cuda.empty_cache()


INVARIANCE = (("add", 1024, 2048), ("gated", 1024, 1024), ("normed", 1024, 4096))


def invariance_tile(rows: int, columns: int, depth: int, warps: int, tma: bool) -> ProductTile:
    sizes = (16, 64, 128, 256) if tma and warps == 8 and columns == 64 else (16, 64, 128)
    tile_rows = next((size for size in sizes if size >= rows), sizes[-1])
    return ProductTile(tile_rows, columns, depth, 2, warps, 3, tma=tma)


def invariance() -> None:
    """Bits of the first rows at other numbers of rows, and with other columns and instructions."""
    for kind, features, inner in INVARIANCE:
        big = Case(kind, features, inner, 256, 1)
        want: torch.Tensor | None = None
        equal: dict[str, bool | str] = {}
        for rows in (1, 2, 8, 16, 17, 64, 100, 128, 256):
            for form in INVARIANCE_FORMS:
                case = Case(kind, features, inner, rows, 1)
                case.weights, case.norm = big.weights, big.norm
                case.x = big.x.rows(rows)
                try:
                    got = case.bits(invariance_tile(rows, *form))
                except Exception as error:
                    equal[f"{rows} {form}"] = repr(error)[:80]
                    continue
                want = got if want is None else want
                count = min(len(got), len(want))
                equal[f"{rows} {form}"] = bool(got[:count].equal(want[:count]))
        differ = {key: value for key, value in equal.items() if value is not True}
        emit(f"invariance {kind}", tried=len(equal), differ=differ)


INVARIANCE_FORMS = (
    (64, 128, 4, False), (64, 64, 8, True), (64, 128, 4, True), (128, 64, 8, True),
)  # fmt: skip


def all_jobs(models: Iterable[str], rows: tuple[int, ...], with_sweep: bool) -> list[Job]:
    """Every compilation of this call, each once."""
    jobs = [
        (kind, inner, invariance_tile(count, *form))
        for kind, _, inner in INVARIANCE
        for count in (16, 64, 128, 256) for form in INVARIANCE_FORMS
    ]  # fmt: skip
    for shapes in (SHAPES[model] for model in models):
        for kind, features, inner in shapes.values():
            for count in rows:
                tile = TILES["sm90"].of(count, features, inner, kind == "gated")
                jobs.append((kind, inner, tile))
                if with_sweep:
                    tiles = candidates(kind, features, inner, count)
                    jobs += [(kind, inner, candidate) for candidate in tiles]
    return list({_compiled(job): job for job in jobs}.values())


class Chain:
    """All products, norms and gates of some layers for some rows."""

    def __init__(self, model: str, rows: int, layers: int) -> None:
        shapes, device = SHAPES[model], torch.device(DEVICE)
        hidden, inner = shapes["gate_up"][2], shapes["down"][2]
        self.matrices = [ProductShape(f, k, kind == "gated") for kind, f, k in shapes.values()]

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_()

        self.maps = [
            {
                name: normal(features * (1 + (kind == "gated")), depth).mul_(depth**-0.5)
                for name, (kind, features, depth) in shapes.items() if kind != "logits"
            }
            for _ in range(layers)
        ]  # fmt: skip
        self.bytes = 2 * sum(matrix.numel() for one in self.maps for matrix in one.values())
        self.norm = torch.ones(hidden, dtype=torch.bfloat16, device=device)
        self.stream = Stream.empty(rows, hidden, torch.bfloat16, device)
        self.stream.residual.normal_()
        self.stream.scaled.copy_(self.stream.residual)
        self.stream.squares.fill_(GROUP)
        self.attended = normal(rows, shapes["output"][2])
        self.qkv, self.wide = normal(rows, shapes["qkv"][1]), normal(rows, 2 * inner)
        self.gates, self.delta = normal(rows, inner), normal(rows, hidden)

    def ours(self) -> Callable[[], None]:
        """The few-row products."""
        made = Products(TILES["sm90"], self.matrices, EPS, torch.bfloat16, torch.device(DEVICE))
        stream, norm = self.stream, self.norm

        def run() -> None:
            for one in self.maps:
                made.normed(stream, one["qkv"], None, self.qkv)
                made.add(self.attended, one["output"], None, norm, stream)
                made.gated(stream, one["gate_up"], self.gates)
                made.add(self.gates, one["down"], None, norm, stream)

        return run

    def library(self) -> None:
        """The library's products with our other kernels."""
        residual, norm, delta = self.stream.residual, self.norm, self.delta
        for one in self.maps:
            torch.mm(delta, one["qkv"].t(), out=self.qkv)
            torch.mm(self.attended, one["output"].t(), out=delta)
            add_rms_norm(residual, delta, norm, self.stream.scaled, EPS)
            torch.mm(self.stream.scaled, one["gate_up"].t(), out=self.wide)
            swiglu(self.wide, self.gates)
            torch.mm(self.gates, one["down"].t(), out=delta)
            add_rms_norm(residual, delta, norm, delta, EPS)

    def same_bits(self) -> bool:
        """Whether ten runs give the same finite bits."""
        parts = (self.stream.residual, self.stream.scaled, self.stream.squares)
        before = [part.clone() for part in parts]
        results = []
        for _ in range(10):
            for part, value in zip(parts, before, strict=True):
                part.copy_(value)
            self.ours()()
            results.append(self.stream.residual.clone())
        return all(one.equal(results[0]) for one in results) and bool(results[0].isfinite().all())


def chain(model: str, rate: float, row_counts: tuple[int, ...], layers: int) -> None:
    """Time a layer's products, norms and gates in one graph, ours and the library's."""
    for rows in row_counts:
        one = Chain(model, rows, layers)
        row: dict[str, Any] = {"equal": one.same_bits()}
        ways = {"library": one.library, "ours": one.ours()}
        for label, call in ways.items():
            try:
                span = seconds(captured(call).replay) / layers
                row[label] = [round(span * 1e6, 1), round(one.bytes / layers / rate / span, 3)]
            except Exception:
                row[label] = traceback.format_exc()[-300:]
        emit(f"chain {model} rows {rows}", us_a_layer_and_share=row)
        del one, ways
        torch.cuda.empty_cache()


def guarded(call: Callable[..., object], *arguments: Any) -> None:
    try:
        call(*arguments)
    except Exception:
        emit("failed", what=call.__name__, said=traceback.format_exc()[-600:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--model", action="append", choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64, 256])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a GPU.")
    rows, models = tuple(options.rows), options.model or list(SHAPES)
    began = time.monotonic()
    good = check_all(all_jobs(models, rows, options.sweep))
    checked = time.monotonic() - began
    rate = copy_rate()
    emit(
        "device", name=torch.cuda.get_device_name(), copy_gb_s=round(rate / 1e9),
        check_s=round(checked, 1),
    )  # fmt: skip
    guarded(invariance)
    for model in models:
        guarded(chain, model, rate, rows, LAYERS[model])
    if options.sweep:
        for model in models:
            guarded(sweep, model, rate, rows, good)


if __name__ == "__main__":
    main()
