"""Mixtures of experts and weights of one byte on the GPU at hand: check them, then measure them.

JSON lines, one call, no files and no network. Each phase is guarded: what fails is a line too, and
the rest goes on; --only takes those whose name begins so, and the checks may run beside each other.
With TRITON_INTERPRET=1 and --tiny the checks run without a GPU.

Bounds. Products: 2⁻⁸ of the value for rounding to bf16, and columns · 2⁻²⁴ of the sum of absolute
products for their order. Mixtures: 2⁻⁸ of each expert's part and of the sum for their rounding, and
six deviations of what rounding the gated values to bf16 does to a part. Models: activations are
rounded to bf16 some nine times a layer, each by 2⁻⁸/√3 of a deviation, independently; six
deviations of the sum. No token is left out: the reference computes with the experts and shares that
the GPU chose, and each of these is checked against the reference's own router, whose logits have
the same bound by the roundings before them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tilefleet_worker import attention, fused_decoder, fused_weights, models
from tilefleet_worker.fused_decoder import FusedWeights
from tilefleet_worker.gpu_engine import GPULimits, build_runner
from tilefleet_worker.gpu_runner import probe
from tilefleet_worker.kernels import mixture as mixture_module
from tilefleet_worker.kernels import scaled_product as product_module
from tilefleet_worker.kernels.mixture import ExpertWeights, MixtureShape, MixtureSpace, mixture
from tilefleet_worker.kernels.routing import Router
from tilefleet_worker.kernels.scaled_matrix import ScaledMatrix, as_fnuz
from tilefleet_worker.kernels.scaled_product import scaled_product
from tilefleet_worker.kernels.weight_tiles import WeightTile, dense
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.models.mlp import Experts
from tilefleet_worker.runner import Runner
from tilefleet_worker.step import StepPlan
from tilefleet_worker.target import arch_of, fp8_type
from tilefleet_worker.weights import Weights

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
FP8 = fp8_type(arch_of(DEVICE)) or torch.int8
BLOCK = 64


def emit(case: str, **values: Any) -> None:
    print(json.dumps({"bench": "gpu_experts", "case": case, **values}), flush=True)


def random_dense(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5).to(DTYPE)


def random_stored(*shape: int) -> ScaledMatrix:
    """fp8 with blocks of 128 × 128."""
    *experts, rows, columns = shape
    blocks = (*experts, -(-rows // 128), -(-columns // 128))
    values = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 30).to(torch.float8_e4m3fn)
    scale = (torch.rand(blocks, device=DEVICE) + 0.5) * columns**-0.5 / 30
    matrix = ScaledMatrix(values, scale, (128, 128))
    return as_fnuz(matrix) if FP8 is torch.float8_e4m3fnuz else matrix


def excess(got: torch.Tensor, want: torch.Tensor, terms: torch.Tensor, columns: int) -> float:
    """Largest error over its bound; terms: sums of absolute products."""
    bound = want.abs() * 2**-8 + terms * columns * 2**-24 + 1e-30
    return float(f"{((got.double() - want).abs() / bound).max().item():.3g}")


# Checks -----------------------------------------------------------------------------------------


def check_codes() -> None:
    """Every code as the device decodes it, NaN included, in each type that is stored."""
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    for kind in (FP8, torch.int8):
        values = torch.zeros(256, 16, dtype=torch.uint8, device=DEVICE)
        values[:, 0] = every
        matrix = ScaledMatrix(values.view(kind), torch.ones(1, 1, device=DEVICE), (256, 16))
        x = torch.zeros(1, 16, dtype=DTYPE, device=DEVICE)
        x[0, 0] = 1
        got = scaled_product(x, matrix, None, torch.empty(1, 256, dtype=DTYPE, device=DEVICE))[0]
        want = every.view(kind).float()
        wrong = (got.float() != want) & ~(got.isnan() & want.isnan())
        emit(f"check codes {kind}", wrong=every[wrong].tolist(), nan=int(want.isnan().sum()))


def check_products(tiny: bool) -> None:
    shapes = ((96, 256),) if tiny else ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))
    for features, columns in shapes:
        matrix, bias = random_stored(features, columns), random_dense(features)
        values, worst, same = matrix.dequantized().double(), {}, {}
        x = torch.randn(300, columns, device=DEVICE).to(DTYPE)
        first = None
        for rows in (1, 2, 16, 17, 64, 65, 300):
            out = torch.empty(rows, features, dtype=DTYPE, device=DEVICE)
            scaled_product(x[:rows].contiguous(), matrix, bias, out)
            want = x[:rows].double() @ values.t()
            terms = x[:rows].double().abs() @ values.abs().t()
            worst[rows] = excess(out, want + bias.double(), terms, columns)
            first = out[:1].clone() if first is None else first
            same[rows] = bool(out[:1].equal(first))
        emit(f"check product {features}×{columns}", error_over_bound=worst, bitwise_alone=same)


def random_experts(experts: int, chosen: int, hidden: int, inner: int, stored: bool) -> Any:
    make = random_stored if stored else random_dense
    router = Router(random_dense(experts, hidden) * 3, chosen, True)
    return ExpertWeights(router, make(experts, 2 * inner, hidden), make(experts, hidden, inner))


def mixture_truth(x: torch.Tensor, weights: ExpertWeights) -> tuple[torch.Tensor, ...]:
    """fp64 results, bounds of their errors, and which tokens' choice is no near tie."""
    logits = x.double() @ weights.router.weight.double().t()
    best = logits.topk(weights.router.chosen + 1, -1)
    clear = best.values[:, -2] - best.values[:, -1] > 1e-4
    chosen = best.indices[:, :-1]
    shares = logits.softmax(-1).gather(1, chosen)
    shares = shares / shares.sum(-1, keepdim=True)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    bound = torch.zeros_like(out)
    gate_up, down = dense(weights.gate_up), dense(weights.down)
    for number in range(len(weights.router.weight)):
        token, rank = torch.where(chosen == number)
        gate, up = (x[token].double() @ gate_up[number].double().t()).chunk(2, -1)
        made = (gate * torch.sigmoid(gate) * up) @ down[number].double().t()
        share, rms = shares[token, rank, None], made.pow(2).mean(-1, keepdim=True).sqrt()
        out.index_add_(0, token, made * share)
        bound.index_add_(0, token, (6 / 3**0.5 * rms + made.abs()) * share * 2**-8)
    return out, bound + out.abs() * 2**-8 + 1e-30, clear


def check_mixture(tiny: bool) -> None:
    cases = ((8, 2, 64, 48),) if tiny else ((128, 8, 2048, 768), (8, 2, 4096, 2048))
    for experts, chosen, hidden, inner in cases:
        for stored in (False, True):
            weights = random_experts(experts, chosen, hidden, inner, stored)
            most = 40 if tiny else 2048
            shape = MixtureShape(experts, chosen, hidden, inner)
            space = MixtureSpace(shape, most, DTYPE, DEVICE)
            x = torch.randn(most, hidden, device=DEVICE).to(DTYPE)
            want, bound, clear = mixture_truth(x, weights)
            worst, same, first = {}, {}, None
            for tokens in (1, 5, 16, 40, 512, 2048):
                if tokens > most:
                    continue
                part = x[:tokens].contiguous()
                got = mixture(part, weights, space, torch.full_like(part, torch.nan))
                error = (got.double() - want[:tokens]).abs() / bound[:tokens]
                worst[tokens] = round(error[clear[:tokens]].max().item(), 3)
                first = got[:1].clone() if first is None else first
                same[tokens] = bool(got[:1].equal(first))
            emit(
                f"check mixture {experts} experts, {'fp8' if stored else 'plain'}",
                error_over_bound=worst, bitwise_alone=same, near_ties=int((~clear).sum()),
            )  # fmt: skip


# Models -----------------------------------------------------------------------------------------


def write_model(folder: Path, kind: str, tiny: bool) -> None:
    """Random weights that bf16 holds exactly, or fp8 with power-of-two scales."""
    hidden, layers, heads, kv_heads, dim, vocab = (64, 2, 2, 1, 64, 96) if tiny else (
        512, 4, 8, 2, 64, 2048
    )  # fmt: skip
    inner, experts = (96, 4) if tiny else (384, 16)
    moe, fp8 = "experts" in kind, "fp8" in kind
    mixtral = "mixtral" in kind
    name = "MixtralForCausalLM" if mixtral else f"Qwen3{'Moe' if moe else ''}ForCausalLM"
    config: dict[str, Any] = {
        "architectures": [name], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": dim, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
        "num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": 2,
        "moe_intermediate_size": inner, "norm_topk_prob": True, "hidden_act": "silu",
    }  # fmt: skip
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}

    def put(where: str, *shape: int, scale: float = 1.0, center: float = 0.0) -> None:
        made = torch.randn(shape, generator=generator) * scale + center
        tensors[f"{where}.weight"] = made.bfloat16()

    def put_map(where: str, rows: int, columns: int) -> None:
        if not fp8:
            put(where, rows, columns, scale=columns**-0.5)
            return
        blocks = -(-rows // 128), -(-columns // 128)
        powers = torch.randint(-6, -4, blocks, generator=generator)
        codes = torch.randn(rows, columns, generator=generator) * columns**-0.5 * 2**5.5
        tensors[f"{where}.weight"] = codes.to(torch.float8_e4m3fn)
        tensors[f"{where}.weight_scale_inv"] = torch.exp2(powers.float())

    put("model.embed_tokens", vocab, hidden)
    put("lm_head", vocab, hidden, scale=hidden**-0.5)
    put("model.norm", hidden, scale=0.1, center=1.0)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            put(f"{at}.{norm}", hidden, scale=0.1, center=1.0)
        if not mixtral:
            for norm in ("q_norm", "k_norm"):
                put(f"{at}.self_attn.{norm}", dim, scale=0.1, center=1.0)
        for part, rows in {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}.items():
            put_map(f"{at}.self_attn.{part}_proj", rows, hidden)
        put_map(f"{at}.self_attn.o_proj", hidden, heads * dim)
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        block = f"{at}.block_sparse_moe" if mixtral else f"{at}.mlp"
        if moe:
            put(f"{block}.gate", experts, hidden, scale=3 * hidden**-0.5)
        for mlp in [f"{block}.experts.{e}" for e in range(experts)] if moe else [block]:
            for part, (rows, columns) in zip(
                names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True
            ):
                put_map(f"{mlp}.{part}", rows, columns)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


ROUNDINGS = 9
"""Of activations to bf16 in a layer."""


def rounding(count: int) -> float:
    """Six deviations of what so many independent roundings to bf16 do, in those of the values."""
    return 6 * 2**-8 / 3**0.5 * count**0.5


Choices = list[tuple[torch.Tensor, torch.Tensor]]
"""Experts and shares [tokens, chosen] of every layer with a router, in order."""


class Recorded:
    """Keeps what the GPU's routers chose; steps must not come from captured graphs meanwhile."""

    def __init__(self) -> None:
        self.choices: Choices = []
        self._plain = fused_decoder.mixture

    def __enter__(self) -> Choices:
        def call(x: Any, weights: ExpertWeights, space: MixtureSpace, out: Any) -> torch.Tensor:
            made = self._plain(x, weights, space, out)
            size = (len(x), weights.router.chosen)
            routing, count = space.routing, len(x) * weights.router.chosen
            found = routing.chosen[:count].view(size), routing.shares[:count].view(size)
            self.choices.append((found[0].long().cpu(), found[1].double().cpu()))
            return made

        fused_decoder.mixture = call
        return self.choices

    def __exit__(self, *_: object) -> None:
        fused_decoder.mixture = self._plain


class Replayed:
    """Gives the reference the GPU's choices, and judges each by the reference's own logits.

    A choice is right when no expert left out has a logit above a chosen one's by more than the
    bound, shares when the logarithms of their ratios are the differences of the logits within it.
    With both given, no rounding is amplified: the bound of the logits holds for every token.
    spreads: deviation of a router's logits for a deviation of its input, by layer.
    """

    def __init__(self, layers: list[int], spreads: list[float]) -> None:
        self.different = 0
        self.choice = self.share = 0.0
        """Largest errors, in bounds."""
        errors = [2**0.5 * rounding(ROUNDINGS * (layer + 1)) for layer in layers]  # of differences
        self._bounds = [error * spread for error, spread in zip(errors, spreads, strict=True)]
        self._plain = Experts.choose

    def replaying(self, choices: Choices) -> "Replayed":
        """For the next step of the reference."""
        self._todo = list(zip(choices, self._bounds, strict=True))
        return self

    def __enter__(self) -> None:
        def call(experts: Experts, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            (chosen, shares), bound = self._todo.pop(0)
            self._judge(logits.double(), chosen, shares, bound)
            _, own = self._plain(experts, logits)
            self.different += int((own.sort(-1).values != chosen.sort(-1).values).any(-1).sum())
            return shares, chosen

        Experts.choose = call  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Experts.choose = self._plain  # type: ignore[method-assign]

    def _judge(
        self, logits: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, bound: float
    ) -> None:
        taken = logits.gather(1, chosen)
        others = logits.scatter(1, chosen, -torch.inf).amax(-1)
        self.choice = max(self.choice, ((others - taken.amin(-1)) / bound).max().item())
        ratio = (shares / shares[:, :1]).log() - (taken - taken[:, :1])
        self.share = max(self.share, (ratio.abs() / bound).max().item())


def router_spreads(weights: FusedWeights) -> tuple[list[int], list[float]]:
    """Layers with a router, and its largest row's length by the input's (the norm's weights)."""
    found = [(n, layer) for n, layer in enumerate(weights.layers) if layer.router is not None]
    sizes = [
        layer.router.weight.float().norm(dim=1).max() * layer.mlp_norm.float().pow(2).mean().sqrt()
        for _, layer in found
        if layer.router is not None
    ]
    return [n for n, _ in found], [size.item() for size in sizes]


def check_model(kind: str, tiny: bool) -> None:
    """Logits of the GPU's runner, and of the cpu backend in fp32 with the GPU's routing.

    A second reference chooses for itself: where its choice is another one, its later logits are
    those of another model, which shows what the routing alone does.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, kind, tiny)
        config = ModelConfig.from_folder(folder)
        with torch.inference_mode(), Weights(folder) as weights:
            model = models.load(config, weights, 1024)
        with torch.inference_mode(), Weights(folder) as weights:
            fused = fused_weights.load(config, weights, 1024, DTYPE, DEVICE)
    stored = sum(isinstance(layer.down, ScaledMatrix) for layer in fused.layers)
    with torch.inference_mode():
        runner, _ = build_runner(config, fused, GPULimits(256, 8, 1024, BLOCK, 2**26))
    runner.warm_up(256)
    runner.capture()
    attend = attention.create("cpu", config)
    cpu, free = (Runner(model, KVCache(config, 16, BLOCK), attend) for _ in range(2))
    replayed = Replayed(*router_spreads(fused))
    bound = rounding(ROUNDINGS * config.num_layers + 3)
    errors, own, same_bits, equal, clear, choices = [], [], 0, 0, 0, 0
    for length in (1, 20) if tiny else (1, 40, 150):
        generator = torch.Generator().manual_seed(length)
        prompt = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
        blocks = tuple(range(8))
        start, tokens = 0, tuple(prompt)
        for _ in range(3 if tiny else 32):
            plan = StepPlan.of((probe(start, tokens, blocks),))
            got = runner.logits(plan)[0].double().cpu()
            graphs, runner._graphs = runner._graphs, None
            with Recorded() as made:
                again = runner.logits(plan)[0].double().cpu()
            runner._graphs = graphs
            same_bits += int(again.equal(got))
            with replayed.replaying(made):
                want = cpu.logits(plan)[0].double()
            own.append(((got - free.logits(plan)[0].double()).abs().max() / want.std()).item())
            errors.append(((got - want).abs().max() / want.std()).item())
            choices += len(made) * len(tokens)
            best = want.topk(2)
            start, tokens = start + len(tokens), (int(best.indices[0]),)
            if best.values[0] - best.values[1] > 2 * bound * want.std():
                clear += 1
                equal += int(got.argmax() == best.indices[0])
    emit(
        f"check model {kind}", tokens=len(errors), layers_stored=stored,
        largest_error_std=round(max(errors), 5), bound=round(bound, 5),
        within_bound=sum(error <= bound for error in errors),
        greedy_equal=equal, of_clear=clear, graph_same_bits=same_bits,
        choices=choices, choices_unlike_reference=replayed.different,
        choice_error_over_bound=round(replayed.choice, 3),
        share_error_over_bound=round(replayed.share, 3),
        largest_error_std_with_reference_routing=round(max(own), 5),
    )  # fmt: skip


# Measurements -----------------------------------------------------------------------------------


def device_seconds(call: Callable[[], object], times: int = 5) -> float:
    """Median seconds of a captured call on the device."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    spans = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in spans) / 1e3


def copy_rate() -> float:
    a = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() / device_seconds(lambda: b.copy_(a))


SHAPES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096),
          "down": (4096, 14336)}  # fmt: skip


def measure_products(counts: tuple[int, ...]) -> None:
    """Products of Llama 3.1 8B in fp8, and the library's in bf16, over more than the L2 holds."""
    rate = copy_rate()
    for name, (features, columns) in SHAPES.items():
        copies = max(2, 2**27 // (features * columns))
        stored = [random_stored(features, columns) for _ in range(copies)]
        plain = [random_dense(features, columns) for _ in range(copies)]
        for rows in counts:
            x = torch.randn(rows, columns, device=DEVICE).to(DTYPE)
            out = torch.empty(rows, features, dtype=DTYPE, device=DEVICE)

            def ours(x=x, out=out, stored=stored) -> None:  # type: ignore[no-untyped-def]
                for matrix in stored:
                    scaled_product(x, matrix, None, out)

            def library(x=x, out=out, plain=plain) -> None:  # type: ignore[no-untyped-def]
                for matrix in plain:
                    torch.mm(x, matrix.t(), out=out)

            seconds, peer = device_seconds(ours) / copies, device_seconds(library) / copies
            size = features * columns
            emit(
                f"fp8 product {name} rows {rows}", us=round(seconds * 1e6, 1),
                gb_s=round(size / seconds / 1e9), share_of_copy=round(size / seconds / rate, 3),
                tflop_s=round(2 * rows * size / seconds / 1e12, 1),
                bf16_library_us=round(peer * 1e6, 1), speedup=round(peer / seconds, 2),
            )  # fmt: skip


def sweep_products(rows: int, width: int) -> None:
    """Tiles for a number of rows: features of a program, warps, stages."""
    stored = {name: [random_stored(*shape) for _ in range(max(2, 2**27 // (shape[0] * shape[1])))]
              for name, shape in SHAPES.items()}  # fmt: skip
    kept = product_module.tile_for
    for features in (64, 128) if rows > 64 else (16, 32, 64):
        for warps, stages in ((2, 4), (4, 3), (4, 4), (4, 6), (8, 3), (8, 4)):
            chosen = width, WeightTile(features, warps, stages)
            product_module.tile_for = lambda arch, count, chosen=chosen: chosen
            took = {}
            try:
                for name, matrices in stored.items():
                    x = torch.randn(rows, matrices[0].shape[1], device=DEVICE).to(DTYPE)
                    out = torch.empty(rows, len(matrices[0].values), dtype=DTYPE, device=DEVICE)

                    def run(x=x, out=out, matrices=matrices) -> None:  # type: ignore[no-untyped-def]
                        for matrix in matrices:
                            scaled_product(x, matrix, None, out)

                    took[name] = round(device_seconds(run, 3) / len(matrices) * 1e6, 1)
                emit(f"sweep rows {rows}", tile=[width, features, warps, stages], us=took)
            except Exception as error:
                emit(f"sweep rows {rows}", tile=[width, features, warps, stages],
                     failed=repr(error)[-150:])  # fmt: skip
    product_module.tile_for = kept


def measure_mixture(tiles: bool) -> None:
    """Qwen3-30B-A3B's layer: time, and bytes of the experts touched over the copy rate."""
    rate = copy_rate()
    experts, chosen, hidden, inner = 128, 8, 2048, 768
    for stored in (False, True):
        layers = [random_experts(experts, chosen, hidden, inner, stored) for _ in range(3)]
        shape = MixtureShape(experts, chosen, hidden, inner)
        space = MixtureSpace(shape, 4096, DTYPE, DEVICE)
        kept = mixture_module.tile_for
        sweep = [(f, w, s) for f in (16, 32, 64) for w, s in ((4, 3), (4, 4), (4, 5), (8, 3))]
        for tokens in (1, 8, 64, 256, 4096):
            x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE)
            out = torch.empty_like(x)

            def run(x=x, out=out, layers=layers, space=space) -> None:  # type: ignore[no-untyped-def]
                for layer in layers:
                    mixture(x, layer, space, out)

            seconds = device_seconds(run) / len(layers)
            touched = len(space.routing.chosen[: tokens * chosen].unique())
            size = touched * 3 * hidden * inner * (1 if stored else 2)
            emit(
                f"mixture {'fp8' if stored else 'bf16'} tokens {tokens}",
                us=round(seconds * 1e6, 1), experts=touched,
                share_of_copy=round(size / seconds / rate, 3),
                tflop_s=round(6 * tokens * chosen * hidden * inner / seconds / 1e12, 1),
            )  # fmt: skip
            for features, warps, stages in sweep if tiles and tokens in (1, 64, 4096) else ():
                mixture_module.tile_for = lambda arch, rows, f=features, w=warps, s=stages: (
                    WeightTile(f, w, s)
                )
                try:
                    took = round(device_seconds(run, 3) / len(layers) * 1e6, 1)
                    emit("sweep mixture", stored=stored, tokens=tokens,
                         tile=[features, warps, stages], us=took)  # fmt: skip
                except Exception as error:
                    emit("sweep mixture", tile=[features, warps, stages], failed=repr(error)[-150:])
            mixture_module.tile_for = kept


def guarded(name: str, phase: Callable[[], None]) -> None:
    began = time.monotonic()
    try:
        with torch.inference_mode():
            phase()
    except Exception:
        emit(name, failed=traceback.format_exc()[-1200:])
    emit(f"phase {name}", seconds=round(time.monotonic() - began, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, checks only")
    parser.add_argument("--sweep", action="store_true", help="also try other tiles")
    parser.add_argument("--only", default="", help="phases whose name begins so")
    options = parser.parse_args()
    tiny: bool = options.tiny
    torch.manual_seed(0)
    import triton

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "Triton interpreter"
    emit("device", name=name, torch=torch.__version__, triton=triton.__version__)
    phases: dict[str, Callable[[], None]] = {
        "codes": check_codes,
        "products": lambda: check_products(tiny),
        "mixture": lambda: check_mixture(tiny),
    }
    for kind in ("qwen3 fp8", "qwen3 experts", "qwen3 experts fp8", "mixtral experts"):
        phases[f"model {kind}"] = lambda kind=kind: check_model(kind, tiny)  # type: ignore[misc]
    if not tiny:
        phases["measure products"] = lambda: measure_products((1, 8, 16, 64, 256, 4096))
        phases["measure mixture"] = lambda: measure_mixture(options.sweep)
        for rows, width in ((1, 16), (32, 32), (64, 64), (512, 128)) if options.sweep else ():
            phases[f"sweep {rows}"] = lambda rows=rows, width=width: sweep_products(rows, width)  # type: ignore[misc]
    for name, phase in phases.items():
        if name.startswith(options.only):
            guarded(name, phase)
    return 0


if __name__ == "__main__":
    sys.exit(main())
