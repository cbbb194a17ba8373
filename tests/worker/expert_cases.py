"""Mixtures of experts and stored weights against their references, in Triton's interpreter, fp32.

python expert_cases.py kernels|model. Needs TRITON_INTERPRET=1.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from fused_kernel_cases import CPU, compare, near
from safetensors.torch import save_file

from tilefleet_worker import fused_weights
from tilefleet_worker.kernels.mixture import (
    ExpertWeights,
    MixtureShape,
    MixtureSpace,
    mixture,
    mixture_reference,
)
from tilefleet_worker.kernels.routing import (
    LARGE_ROWS,
    Router,
    RoutingSpace,
    block_rows,
    route,
    route_reference,
)
from tilefleet_worker.kernels.scaled_matrix import ScaledMatrix, as_fnuz
from tilefleet_worker.kernels.scaled_product import scaled_product
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.weights import Weights

E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def random_matrix(shape, block, kind):
    """Values within ±1.5 and a scale of its own for each block."""
    *experts, rows, columns = shape
    blocks = (*experts, -(-rows // block[0]), -(-columns // block[1]))
    codes = torch.randn(shape) * 20
    values = codes.round().to(kind) if kind == torch.int8 else codes.to(kind)
    scale = (torch.rand(blocks) + 0.5) * 0.05 * columns**-0.5
    matrix = ScaledMatrix(values, scale, block)
    return as_fnuz(matrix) if kind == FNUZ else matrix


def mixtures():
    """Experts that nobody chose, all of them chosen, blocks of both sizes, cut tiles, scales."""
    cases = ((8, 64, 48, 2, 5, None), (3, 40, 24, 3, 1, None), (2, 32, 16, 1, 129, None),
             (4, 96, 48, 2, 3, (16, 32)), (4, 64, 40, 2, 2, (1, 64)))  # fmt: skip
    for experts, hidden, inner, chosen, tokens, block in cases:
        router = Router(torch.randn(experts, hidden), chosen, normalized=chosen > 1)
        shapes = (experts, 2 * inner, hidden), (experts, hidden, inner)
        if block is None:
            gate_up, down = (torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes)
        else:
            gate_up, down = (random_matrix(shape, block, E4M3) for shape in shapes)
        weights = ExpertWeights(router, gate_up, down)
        shape = MixtureShape(experts, chosen, hidden, inner)
        space = MixtureSpace(shape, tokens, torch.float32, CPU)
        x = torch.randn(tokens, hidden)
        got = mixture(x, weights, space, torch.full_like(x, torch.nan))
        near(got, mixture_reference(x, weights), f"mixture of {experts}")
        alone = mixture(x[-1:].clone(), weights, space, torch.empty(1, hidden))
        if tokens < LARGE_ROWS and not alone.equal(got[-1:]):
            sys.exit(f"mixture of {experts}: a token's bits depend on its batch-mates")
    if block_rows(129, 2) != LARGE_ROWS:
        sys.exit("no case has large blocks")


def routing():
    """Every pair is in one block of its expert, in order; ties go to the lower number."""
    experts, chosen, hidden = 5, 2, 32
    router = Router(torch.randn(experts, hidden), chosen, normalized=False)
    router.weight[3] = router.weight[1]  # a tie wherever 1 is chosen
    x = torch.randn(90, hidden)
    x[7] = torch.nan
    space = RoutingSpace(experts, chosen, len(x), CPU)
    space.pairs.fill_(-7)
    space.experts.fill_(-7)
    rows, blocks = route(x, router, space)
    real = torch.arange(90) != 7
    shares, _ = route_reference(x[real], router)
    got = space.chosen.view(-1, chosen)
    near(space.shares.view(-1, chosen)[real], shares, "shares")
    if ((got == 3).any(1) & (got != 1).all(1))[real].any() or got.min() < 0 or got.max() >= experts:
        sys.exit(f"of equal experts the higher number was chosen, or none: {got}")
    placed = space.pairs.view(-1, rows)[:blocks]
    used = space.experts[:blocks] >= 0
    if set(space.experts[:blocks].tolist()) - set(range(-1, experts)):
        sys.exit(f"blocks belong to {space.experts[:blocks]}")
    for expert in range(experts):
        mine = placed[space.experts[:blocks] == expert].flatten()
        want = (space.chosen == expert).nonzero().flatten()
        if not mine[mine >= 0].equal(want.int()) or len(mine) - len(want) >= rows:
            sys.exit(f"expert {expert} has pairs {mine}, expected {want}")
    if used.sum() != sum(-(-n // rows) for n in torch.bincount(space.chosen, minlength=experts)):
        sys.exit("a block without a pair")


def scaled():
    """Blocks cut at both ends, per tensor, per row; every kind of code; one and two tiles."""
    for rows, columns, block, tokens in (
        (50, 200, (32, 32), 3), (50, 200, (50, 200), 17), (33, 130, (1, 130), 70),
        (140, 300, (128, 128), 2), (20, 2100, (128, 128), 3), (20, 2100, (20, 2100), 66),
    ):  # fmt: skip
        for kind in (E4M3, FNUZ, torch.int8):
            matrix = random_matrix((rows, columns), block, kind)
            x, bias = torch.randn(tokens, columns), torch.randn(rows)
            want = x.double() @ matrix.dequantized().double().t() + bias
            got = scaled_product(x, matrix, bias, torch.empty(tokens, rows))
            near(got, want, f"{kind} {block}")
    codes()


def codes():
    """Every code of both kinds, decoded by the kernel as torch decodes it.

    But for codes of NaN: the interpreter takes them for numbers.
    """
    every = torch.arange(256, dtype=torch.uint8)
    for kind in (E4M3, FNUZ):
        values = torch.zeros(256, 16, dtype=torch.uint8)
        values[:, 0] = every
        matrix = ScaledMatrix(values.view(kind), torch.ones(1, 1), (256, 16))
        x = torch.zeros(1, 16)
        x[0, 0] = 1
        got = scaled_product(x, matrix, None, torch.empty(1, 256))[0]
        want = every.view(kind).float()
        if not got[~want.isnan()].equal(want[~want.isnan()]):
            sys.exit(f"{kind}: {(got != want).nonzero().flatten()} are decoded wrongly")


def quantized(weight, height, width):
    """Stored values and scales of a matrix in blocks; the last ones cut."""
    rows, columns = weight.shape
    high, wide = -(-rows // height), -(-columns // width)
    padded = torch.zeros(high * height, wide * width)
    padded[:rows, :columns] = weight
    scale = padded.view(high, height, wide, width).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return (weight / spread[:rows, :columns]).to(E4M3), scale


def expert_model(folder):
    """A random Qwen3-MoE in fp8: a dense layer, a sparse one, blocks that cut the joined maps."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 96, "hidden_size": 64,
        "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "norm_topk_prob": True, "mlp_only_layers": [0],
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]},
    }  # fmt: skip
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 0.3)

    tensors = {"model.embed_tokens.weight": random(96, 64) * 7, "lm_head.weight": random(96, 64)}
    maps = {}
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        for name, shape in {"q": (128, 64), "k": (64, 64), "v": (64, 64), "o": (64, 128)}.items():
            maps[f"{attention}.{name}_proj"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = 1 + random(64)
        for name in ("q_norm", "k_norm"):
            tensors[f"{attention}.{name}.weight"] = 1 + random(64)
        mlp = f"model.layers.{layer}.mlp"
        experts = [(mlp, 80)] if layer == 0 else [(f"{mlp}.experts.{e}", 48) for e in range(4)]
        for name, inner in experts:
            maps |= {f"{name}.gate_proj": (inner, 64), f"{name}.up_proj": (inner, 64)}
            maps[f"{name}.down_proj"] = (64, inner)
    tensors |= {
        "model.norm.weight": 1 + random(64),
        "model.layers.1.mlp.gate.weight": random(4, 64),
    }
    for name, shape in maps.items():
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = quantized(
            random(*shape), 64, 32
        )
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def model():
    """Weights stay in fp8, and chunks, mixed steps and decodes give the cpu backend's tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expert_model(folder)
        config = ModelConfig.from_folder(folder)
        with torch.inference_mode(), Weights(folder) as weights:
            fused = fused_weights.load(config, weights, 64, torch.float32, CPU)
        for layer in fused.layers:
            for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down):
                if matrix.values.dtype != E4M3:
                    sys.exit(f"a matrix of {matrix.values.dtype}")
        compare(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[1] == "model":
        model()
    else:
        for check in (mixtures, routing, scaled):
            check()
    print("checked")
