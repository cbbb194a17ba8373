"""Quantised checkpoints: the model served is that of the dequantised weights, in every form."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from tilefleet_worker import attention, models
from tilefleet_worker.errors import ModelError
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.runner import Runner
from tilefleet_worker.step import StepPlan, StepRow
from tilefleet_worker.weights import Weights

E4M3 = torch.float8_e4m3fn
PROMPT = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(2)).tolist()
Quantized = tuple[dict[str, torch.Tensor], torch.Tensor]  # tensors by suffix, values they stand for
Quantize = Callable[[torch.Tensor], Quantized]


def blocks(weight: torch.Tensor, height: int, width: int) -> Iterator[tuple[int, int, Any]]:
    """Row and column of each block, and the part of the weight that it covers."""
    for row in range(0, len(weight), height):
        for column in range(0, weight.shape[1], width):
            where = (slice(row, row + height), slice(column, column + width))
            yield row // height, column // width, where


def scaled(weight: torch.Tensor, height: int, width: int, kind: torch.dtype) -> Any:
    """Quantise block by block: stored, scales, values; the plainest way that can be written."""
    largest = 448.0 if kind == E4M3 else 127.0
    rows, columns = -(-len(weight) // height), -(-weight.shape[1] // width)
    stored, values = torch.zeros_like(weight, dtype=kind), torch.zeros_like(weight)
    scales = torch.zeros(rows, columns)
    for row, column, where in blocks(weight, height, width):
        scale = scales[row, column] = weight[where].abs().max() / largest
        part = weight[where] / scale
        stored[where] = part.to(kind) if kind == E4M3 else part.round().to(kind)
        values[where] = stored[where].float() * scale
    return stored, scales, values


def fp8_blocks(weight: torch.Tensor) -> Quantized:
    stored, scales, values = scaled(weight, 16, 32, E4M3)
    return {"weight": stored, "weight_scale_inv": scales}, values


def fp8_powers_of_two(weight: torch.Tensor) -> Quantized:
    """Scales of type E8M0: only an exponent."""
    _, scales, _ = scaled(weight, 16, 32, E4M3)
    scales = torch.exp2(scales.log2().ceil())
    stored, values = torch.zeros_like(weight, dtype=E4M3), torch.zeros_like(weight)
    for row, column, where in blocks(weight, 16, 32):
        stored[where] = (weight[where] / scales[row, column]).to(E4M3)
        values[where] = stored[where].float() * scales[row, column]
    return {"weight": stored, "weight_scale_inv": scales.to(torch.float8_e8m0fnu)}, values


def fp8_tensor(weight: torch.Tensor) -> Quantized:
    stored, scales, values = scaled(weight, *weight.shape, E4M3)
    extra = {"weight_scale": scales.reshape(()), "input_scale": torch.tensor(0.5)}
    return {"weight": stored, **extra}, values


def fp8_channel(weight: torch.Tensor) -> Quantized:
    stored, scales, _ = scaled(weight, 1, weight.shape[1], E4M3)
    short = scales.bfloat16()
    return {"weight": stored, "weight_scale": short}, stored.float() * short.float()


def int8_channel(weight: torch.Tensor) -> Quantized:
    stored, scales, values = scaled(weight, 1, weight.shape[1], torch.int8)
    return {"weight": stored, "weight_scale": scales}, values


def int8_group_asymmetric(weight: torch.Tensor) -> Quantized:
    """(stored - zero point) · scale, groups of 16 columns."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // 16, 16)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    stored = (grouped / scale[..., None] + zero[..., None]).round().clamp(-128, 127)
    values = ((stored - zero[..., None]) * scale[..., None]).view(rows, columns)
    tensors = {
        "weight": stored.view(rows, columns).to(torch.int8),
        "weight_scale": scale,
        "weight_zero_point": zero.to(torch.int8),
    }
    return tensors, values


def compressed(strategy: str, kind: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


FORMS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "fp8 blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [16, 32]}),
    "fp8 blocks, E8M0": (
        fp8_powers_of_two,
        {"quant_method": "fp8", "weight_block_size": [16, 32], "scale_fmt": "ue8m0"},
    ),
    "fp8 tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "compressed fp8 tensor": (fp8_tensor, compressed("tensor", "float")),
    "compressed fp8 channel": (fp8_channel, compressed("channel", "float")),
    "compressed fp8 blocks": (
        lambda weight: ({"weight": (made := fp8_blocks(weight))[0]["weight"],
                         "weight_scale": made[0]["weight_scale_inv"]}, made[1]),
        compressed("block", "float", block_structure="16x32"),
    ),
    "compressed int8 channel": (int8_channel, compressed("channel", "int")),
    "compressed int8 group": (
        int8_group_asymmetric,
        compressed("group", "int", group_size=16, symmetric=False),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain"))


def write_plain(folder: Path) -> Path:
    """An unquantised model with experts; 72 and 56 divide into no whole blocks of 32."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=72, intermediate_size=56, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=40, mlp_only_layers=[0],
        initializer_range=0.15, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def quantize(plain: Path, folder: Path, form: str) -> tuple[Path, Path]:
    """A folder with quantised weights, and one with the values that these stand for, in fp32."""
    function, quantization = FORMS[form]
    tensors = load_file(plain / "model.safetensors")
    values = dict(tensors)
    for name, weight in list(tensors.items()):
        wide = weight.shape[-1] % 16 == 0 or "group" not in form
        if "_proj" in name and wide:
            made, values[name] = function(weight)
            del tensors[name]
            tensors |= {name.removesuffix("weight") + key: t for key, t in made.items()}
    config = json.loads((plain / "config.json").read_text())
    for path, content, extra in (
        (folder / "q", tensors, {"quantization_config": quantization}),
        (folder / "v", values, {}),
    ):
        path.mkdir()
        save_file({n: t.contiguous() for n, t in content.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config | extra))
    return folder / "q", folder / "v"


def logits(folder: Path) -> torch.Tensor:
    config = ModelConfig.from_folder(folder)
    with torch.inference_mode(), Weights(folder) as weights:
        model = models.load(config, weights, 128)
    runner = Runner(model, KVCache(config, 8, 16), attention.create("cpu", config))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    row = StepRow("a", 0, tuple(PROMPT), (0, 1, 2), True, params, 0)
    return runner.logits(StepPlan.of([row]))[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_model_is_that_of_its_values(plain: Path, tmp_path: Path, form: str) -> None:
    """Against transformers on the values, made block by block above and not by our code."""
    quantized, values = quantize(plain, tmp_path, form)
    made = logits(quantized)
    reference = transformers.AutoModelForCausalLM.from_pretrained(values, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert made.argmax() == expected.argmax()
    assert (logits(plain) - made).abs().max() > 1e-2  # the quantisation did change the model


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), path)


PROJECTION = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        (f"{PROJECTION}.weight_scale_inv", None, r"weight_scale_inv is missing.*\[4, 3\]"),
        (f"{PROJECTION}.weight_scale_inv", torch.ones(4, 2), r"has shape \[4, 2\].*\[4, 3\]"),
        (
            f"{PROJECTION}.weight",
            torch.zeros(64, 72, dtype=torch.int8),
            "has type torch.int8, but config.json says float8_e4m3fn",
        ),
        ("model.layers.1.self_attn.extra_scale", torch.ones(1), "extra_scale is not part"),
    ],
)
def test_a_damaged_quantised_model_is_refused(
    plain: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, reason: str
) -> None:
    folder, _ = quantize(plain, tmp_path, "fp8 blocks")
    change(folder, name, tensor)
    with pytest.raises(ModelError, match=reason):
        logits(folder)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        (None, r"has type torch.float8_e4m3fn.*no quantization_config"),
        ({"quant_method": "gptq"}, "quant_method must be one of fp8, compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size must be two"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt must be one of e4m3"),
        (compressed("channel", "int", num_bits=4), "num_bits must be 8"),
        (compressed("channel", "int") | {"format": "pack-quantized"}, "format must be one of"),
        (compressed("channel", "int") | {"config_groups": {}}, "config_groups must be an object"),
        (compressed("block", "float"), "block_structure must be two whole numbers"),
        (compressed("group", "int"), "group_size must be a whole number"),
    ],
)
def test_another_quantisation_is_refused_by_name(
    plain: Path, tmp_path: Path, quantization: dict[str, Any] | None, reason: str
) -> None:
    folder, _ = quantize(plain, tmp_path, "fp8 blocks")
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization})
    )
    with pytest.raises(ModelError, match=reason):
        logits(folder)


@pytest.mark.parametrize("where", ["sidecar", "list", "index"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_digest_that_the_folder_gives_is_checked(
    plain: Path, tmp_path: Path, where: str, damaged: bool
) -> None:
    quantize(plain, tmp_path, "fp8 tensor")
    folder, name = tmp_path / "v", "model.safetensors"
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if where == "sidecar":
        (folder / f"{name}.sha256").write_text(f"{digest}\n")
    elif where == "list":
        (folder / "SHA256SUMS").write_text(f"{'0' * 64}  other\n{digest} *{name}\n")
    else:
        index = {"metadata": {"sha256": {name: digest}}, "weight_map": {"x": name}}
        (folder / f"{name}.index.json").write_text(json.dumps(index))
    if damaged:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ModelError, match=f"its SHA-256 is .* expected {digest}"):
            Weights(folder)
    else:
        with Weights(folder) as weights:
            assert weights.files_verified == 1


def test_a_list_of_digests_that_is_none_is_refused(plain: Path, tmp_path: Path) -> None:
    quantize(plain, tmp_path, "fp8 tensor")
    (tmp_path / "v" / "SHA256SUMS").write_text("not a digest\n")
    with pytest.raises(ModelError, match="is not a SHA-256 and a file name"):
        Weights(tmp_path / "v")
