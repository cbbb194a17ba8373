"""Few-row products and their way through the decoder, in Triton's interpreter, fp32.

python few_rows_cases.py products|launches. Needs TRITON_INTERPRET=1.
"""

import sys
import tempfile
from pathlib import Path

import torch
import triton.language as tl
from fused_kernel_cases import windowed_model
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from tilefleet_worker import fused_weights
from tilefleet_worker.few_rows_decoder import FewRowsDecoder
from tilefleet_worker.gpu_engine import GPULimits, build_runner
from tilefleet_worker.gpu_runner import probe
from tilefleet_worker.kernels.product_tiles import GROUP, ProductTile, ProductTiles
from tilefleet_worker.kernels.products import Operands, Products, ProductShape, Stream, launch
from tilefleet_worker.kernels.products import normed_reference as normed
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.step import StepPlan
from tilefleet_worker.weights import Weights

CPU = torch.device("cpu")
EPS = 1e-5
MOST = 8  # launches of a layer


def near(got, want, name):
    torch.testing.assert_close(got.double(), want.double(), rtol=3e-5, atol=3e-5, msg=name)


class Bench:
    """Inputs of one shape, and ours on them."""

    def __init__(self, rows, hidden, inner, tile):
        self.tile = tile
        self.stream = Stream.empty(rows, hidden, torch.float32, CPU)
        self.stream.residual.normal_().mul_(7.0)
        self.norms = torch.randn(2, hidden)
        self.gate_up = torch.randn(2 * inner, hidden) * hidden**-0.5
        self.down = torch.randn(hidden, inner) * inner**-0.5
        self.biases = torch.randn(inner), torch.randn(hidden)
        self.out = torch.full((rows, inner), torch.nan)
        self.partial = torch.full((1 << 20,), torch.nan)
        self.counters = torch.zeros(1 << 12, dtype=torch.int32)

    def run(self, x, weight, out, squares=None, bias=None, stream=None, norm=None, gated=False):
        operands = Operands(x, weight, out, squares, bias, stream, norm, gated)
        launch(self.tile, operands, EPS, self.partial, self.counters, tl.float32)
        if self.counters.any():
            sys.exit("a counter is not ready for the next launch")


def products():
    """Shapes that no tile divides, one tile and many, biases, splits with parts left empty."""
    for rows, hidden, inner, tile in (
        (1, 96, 80, ProductTile(16, 32, 32, 1, 4, 1, tma=True)),
        (3, 100, 72, ProductTile(16, 32, 64, 2, 4, 1)),
        (17, 70, 200, ProductTile(16, 64, 32, 4, 4, 1)),
        (5, 520, 33, ProductTile(16, 32, 128, 4, 4, 1)),
    ):
        one = Bench(rows, hidden, inner, tile)
        begin(one)
        want = normed(one.stream.residual, one.norms[0], EPS)
        gates = want @ one.gate_up.double().t()
        single, squares = one.gate_up[:inner].contiguous(), one.stream.squares
        one.run(one.stream.scaled, single, one.out, squares, one.biases[0])
        near(one.out, gates[:, :inner] + one.biases[0].double(), "normed")
        one.run(one.stream.scaled, one.gate_up, one.out, squares, gated=True)
        gate, up = gates.chunk(2, -1)
        near(one.out, gate * torch.sigmoid(gate) * up, "gated")
        new = one.stream.residual.double() + one.out.double() @ one.down.double().t()
        new += one.biases[1].double()
        one.run(one.out, one.down, one.stream.scaled, None, one.biases[1], one.stream, one.norms[1])
        near(one.stream.residual, new, "stream")
        near(one.stream.scaled, new * one.norms[1].double(), "scaled")
        near(one.stream.squares, squares_of(new), "squares")
        near(normed(one.stream.residual, one.norms[1], EPS), normed(new, one.norms[1], EPS), "next")


def begin(one):
    hidden = one.stream.residual.shape[1]
    made = Products(tiles_of(one.tile), [ProductShape(hidden, hidden)], EPS, torch.float32, CPU)
    made.begin(one.norms[0], one.stream)
    near(one.stream.scaled, one.stream.residual.double() * one.norms[0].double(), "begin")
    near(one.stream.squares, squares_of(one.stream.residual), "squares at the beginning")


def tiles_of(tile):
    one = {tile.rows: (tile,)}
    return ProductTiles(one, one, programs=8, longest=512, max_rows=64, fast_rows=64)


def squares_of(x):
    padded = torch.zeros(len(x), -(-x.shape[1] // GROUP) * GROUP, dtype=torch.float64)
    padded[:, : x.shape[1]] = x.double().square()
    return padded.view(len(x), -1, GROUP).sum(-1)


class Counting(TorchDispatchMode):
    """Counts what a device would launch: Triton's kernels, and torch's operations but views."""

    VIEWS = ("view", "slice", "select", "unbind", "t.", "transpose", "alias", "expand", "empty")

    def __init__(self):
        super().__init__()
        self.names = []
        self.inside = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation).removeprefix("aten.")
        if not self.inside and not name.startswith(self.VIEWS):
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def launches():
    """The difference of models of two layers and of one: what a layer launches."""
    counted = {}
    for layers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            windowed_model(Path(folder), layers)
            counted[layers] = names_of_a_decode(Path(folder))
    added = list(counted[2])
    for name in counted[1]:
        added.remove(name)
    print(f"{len(added)} launches a layer: {', '.join(sorted(added))}")
    if not 4 <= len(added) <= MOST:
        sys.exit(f"a layer has {len(added)} launches: {added}")


def names_of_a_decode(folder):
    config = ModelConfig.from_folder(folder)
    with torch.inference_mode(), Weights(folder) as weights:
        fused = fused_weights.load(config, weights, 64, torch.float32, CPU)
    runner, _ = build_runner(config, fused, GPULimits(32, 4, 64, 16, kv_cache_bytes=2**18))
    if not isinstance(runner._decoder, FewRowsDecoder):
        sys.exit("the decoder does not know steps of few rows")
    counting, launch_one = Counting(), interpreter.GridExecutor.__call__

    def launch_counted(executor, *args, **kwargs):
        counting.names.append(executor.fn.__name__)
        counting.inside = True  # what the interpreter itself does is no launch
        try:
            return launch_one(executor, *args, **kwargs)
        finally:
            counting.inside = False

    interpreter.GridExecutor.__call__ = launch_counted
    try:
        with counting:
            runner.logits(StepPlan.of((probe(3, (1,), (0,)),)))
    finally:
        interpreter.GridExecutor.__call__ = launch_one
    return counting.names


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    products() if sys.argv[1] == "products" else launches()
    print("checked")
