"""Predictions against values computed by hand, and the command that prints them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilefleet_worker.__main__ import main
from tilefleet_worker.price import dollars_per_million
from tilefleet_worker.roofline.accelerators import ACCELERATORS
from tilefleet_worker.roofline.costs import touched
from tilefleet_worker.roofline.prediction import Assumptions, predict
from tilefleet_worker.roofline.shapes import costs_of, model_names

MODEL = Path(__file__).parents[2] / "examples" / "tiny-model" / "model"
near = pytest.approx


def test_bytes_of_llama_8b_are_those_of_its_shapes() -> None:
    costs = costs_of("llama-3.1-8b")
    layer = 4096 * (32 + 8 + 8 + 32) * 128 + 3 * 4096 * 14_336  # 218,103,808
    head = 128_256 * 4096
    assert costs.weight_bytes == 2 * (32 * layer + 2 * head) == 16_059_990_016
    assert costs.step_weight_bytes(1) == costs.step_weight_bytes(64) == 15_009_316_864
    assert costs.kv_bytes(1) == 2 * 8 * 128 * 2 * 32 == 131_072
    assert costs.kv_read_bytes(8192) == 8192 * 131_072
    assert costs.token_flops(1000) == 2 * (32 * layer + head) + 4 * 32 * 128 * 1000 * 32


def test_the_floor_is_that_which_was_measured_against() -> None:
    """5.02 ms at batch 1 and 17.79 at 256, contexts of 1,152 and 3,022 GB/s: gpu-engine.md."""
    costs = costs_of("llama-3.1-8b")
    for batch, milliseconds in ((1, 5.02), (256, 17.79)):
        read = costs.step_weight_bytes(batch) + batch * costs.kv_read_bytes(1152)
        assert read / 3022e9 * 1e3 == near(milliseconds, rel=2e-3)


def test_fp8_halves_the_matrices_but_not_the_head() -> None:
    plain, stored = costs_of("llama-3.1-8b"), costs_of("llama-3.1-8b-fp8")
    matrices, head = 32 * 218_103_808, 128_256 * 4096
    assert stored.step_weight_bytes(1) == near(matrices * (1 + 4 / 128**2) + 2 * head)
    assert stored.kv_bytes(7) == plain.kv_bytes(7)


def test_a_mixture_reads_the_experts_that_its_tokens_choose() -> None:
    costs = costs_of("qwen3-30b-a3b")
    expert, layers = 2 * 3 * 2048 * 768, 48
    one, many = costs.step_weight_bytes(1), costs.step_weight_bytes(10**6)
    assert many - one == near(layers * expert * (128 - 8))
    assert costs.weight_bytes - many == near(2 * 151_936 * 2048)
    assert costs.weight_bytes / 2 == near(30.53e9, rel=1e-3)  # parameters: 30.5 billion


@given(experts=st.integers(1, 300), chosen=st.integers(1, 8), tokens=st.integers(1, 500))
def test_touched_experts_lie_between_one_choice_and_all(
    experts: int, chosen: int, tokens: int
) -> None:
    chosen = min(chosen, experts)
    found = touched(experts, chosen, tokens)
    assert chosen - 1e-6 <= found <= min(experts, tokens * chosen) + 1e-6
    assert touched(256, 6, 64) == near(199.9, abs=0.1)


def test_deepseek_v4_flash_is_counted_matrix_by_matrix() -> None:
    costs = costs_of("deepseek-v4-flash")
    fp8 = 43 * (106_954_752 + 25_165_824) + 21 * 8_388_608
    half = 43 * 1_048_576 + 21 * 10_747_904 + 20 * 4_194_304
    streams, head, expert = 43 * 786_432, 129_280 * 4096, 25_165_824
    parameters = fp8 + half + streams + 2 * head + 43 * 256 * expert
    assert parameters == near(284.33e9, rel=1e-4)  # as published
    read = fp8 + 2 * half + 4 * streams + 2 * head
    assert costs.step_weight_bytes(1) == near(read + 43 * 6 * expert * 17 / 32)
    assert costs.step_weight_bytes(64) == near(read + 43 * 199.9 * expert * 17 / 32, rel=1e-3)
    assert costs.weight_bytes == near(read + 2 * head + 43 * 256 * expert * 17 / 32)
    assert 145.0 < costs.weight_bytes / 2**30 < 145.5
    assert costs.kv_bytes(8192) == 5_132_288 + 32 * 985_664
    rows = 43 * 128 + 21 * 512 + 20 * 64
    assert costs.kv_read_bytes(8192) == rows * 584 + 21 * 2048 * 132
    assert costs.kv_read_bytes(100) == (43 * 100 + 21 * 25) * 584 + 21 * 25 * 132


def test_rows_of_llama_8b_on_mi300x_by_hand() -> None:
    rows = list(predict(costs_of("llama-3.1-8b"), ACCELERATORS["MI300X"], Assumptions(), 1.16))
    first, second, single = rows
    # 15.009 GB of weights and 64 · 8,192 · 131,072 of KV at 0.81 · 5.3 TB/s
    assert first.step_seconds == near((15_009_316_864 + 68_719_476_736) / 4.293e12, rel=1e-9)
    assert (first.bound, first.batch, first.context) == ("memory", 64, 8192)
    assert first.tokens_per_second == near(3281.5, rel=1e-3)
    assert first.memory_bytes == 16_059_990_016 + 68_719_476_736
    assert first.dollars_per_million == near(1.16 / (3281.5 * 3600 / 1e6), rel=1e-3)
    # 128 · 32,768 · 131,072 bytes are 550 GB; 37 such requests fit into 0.92 · 192 GB
    assert (second.bound, second.step_seconds, second.dollars_per_million) == (
        "does not fit", None, None,
    )  # fmt: skip
    assert second.largest_batch == int((0.92 * 192e9 - 16_059_990_016) / (32_768 * 131_072)) == 37
    assert single.step_seconds == near((15_009_316_864 + 4096 * 131_072) / 4.293e12)
    prompt = 4096 * (2 * (32 * 218_103_808 + 128_256 * 4096) + 4 * 32 * 128 * 2048 * 32)
    assert single.prefill_seconds == near(prompt / (0.45 * 1.31e15))


def test_the_cost_formula_is_the_published_one() -> None:
    assert dollars_per_million(0.95, 2701) == near(0.0977, abs=1e-4)


@given(
    model=st.sampled_from(model_names()), name=st.sampled_from(sorted(ACCELERATORS)),
    share=st.floats(0.1, 1),
)  # fmt: skip
def test_a_faster_memory_never_slows_a_step(model: str, name: str, share: float) -> None:
    costs, device = costs_of(model), ACCELERATORS[name]
    slow = predict(costs, device, Assumptions(bandwidth=share), None)
    fast = predict(costs, device, Assumptions(bandwidth=1.0), None)
    for before, after in zip(slow, fast, strict=True):
        assert (before.step_seconds is None) == (before.largest_batch < before.batch)
        assert before.dollars_per_million is None
        if before.step_seconds is not None and after.step_seconds is not None:
            assert after.step_seconds <= before.step_seconds


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    status = main(["roofline", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_table_says_that_it_predicts_and_how(capsys: Any) -> None:
    status, out, _ = run(capsys)
    assert status == 0
    assert out.startswith("Predicted, not measured. step seconds = max(bytes / (bandwidth · 0.81)")
    lines = out.splitlines()[3:]
    assert len(lines) == len(model_names()) * len(ACCELERATORS) * 3
    assert any(line.startswith("deepseek-v4-flash") and "does not fit" in line for line in lines)


def test_json_carries_price_and_basis(capsys: Any) -> None:
    arguments = ["--model", str(MODEL), "--accelerator", "H100", "--price", "H100=2", "-o", "json"]
    status, out, _ = run(capsys, *arguments, "--price-basis", "a contract of 2026")
    assert status == 0
    answer = json.loads(out)
    assert (answer["predicted"], answer["price_basis"]) == (True, "a contract of 2026")
    assert [row["case"] for row in answer["predictions"]] == ["batch 64", "batch 128", "single"]
    for row in answer["predictions"]:
        assert row["model"] == str(MODEL)
        assert row["dollars_per_million"] == near(2 / (row["tokens_per_second"] * 3600e-6))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "gpt-9"), "'gpt-9' is neither a folder with a config.json nor one of"),
        (("--price", "H100=2"), "--price without --price-basis"),
        (("--price", "H100", "--price-basis", "x"), "give ACCELERATOR=DOLLARS"),
        (("--price", "V100=2", "--price-basis", "x"), "an accelerator of MI300X"),
        (("--bandwidth-share", "1.5"), "--bandwidth-share is 1.5: give a share above 0"),
    ],
)
def test_a_wrong_argument_is_answered_with_its_remedy(
    capsys: Any, arguments: tuple[str, ...], said: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert said in err
