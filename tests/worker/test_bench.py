"""The command that measures the engine: figures from known times, and a run on the tiny model."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilefleet_worker.__main__ import main
from tilefleet_worker.bench.cases import Case, curve, rows
from tilefleet_worker.bench.load import Load, Timeline
from tilefleet_worker.bench.summary import pareto, summarise

MODEL = Path(__file__).parents[2] / "examples" / "tiny-model" / "model"
near = pytest.approx


def test_figures_of_known_times_are_those_of_the_formulas() -> None:
    """Two requests of 10 prompt tokens: 4 tokens from 1 s on, every second; 4 from 2 s on."""
    lines = tuple(Timeline(0.0, 10, [begin + n for n in range(4)]) for begin in (1.0, 2.0))
    case = Case("batch", 10, 4, 2, 2)
    row = summarise(case, Load(lines, 5.0, 7, 9), 11, price=3.6)
    assert (row.prompt_tokens, row.output_tokens) == (20, 8)
    assert (row.output_rate, row.total_rate, row.user_rate) == near((1.6, 5.6, 1.0))
    assert (row.ttft.p50, row.ttft.p99, row.e2e.mean, row.tpot.p90) == near((1, 2, 4.5, 1))
    assert row.decode_rate == near(2.0)  # 4 tokens in (2, 4]
    assert row.dollars_per_million_output == near(3.6 / (1.6 * 3600 / 1e6))
    assert row.dollars_per_million_total == near(3.6 / (5.6 * 3600 / 1e6))
    assert summarise(case, Load(lines, 5.0, 7, 9), 11, None).dollars_per_million_total is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_the_best_points_are_beaten_by_none_and_beat_all_others(
    points: list[tuple[int, int]],
) -> None:
    best = {point for point, kept in zip(points, pareto(points), strict=True) if kept}
    assert len({a for a, _ in best}) == len(best) == len({b for _, b in best})
    for point in set(points) - best:
        assert any(a >= point[0] and b >= point[1] for a, b in best)


def test_lengths_and_counts_are_those_of_inferencex_and_of_the_rows() -> None:
    (case,) = curve([(1000, 200)], [8])
    assert (case.warm_ups, case.requests, len(case.lengths())) == (16, 80, 96)
    assert case.lengths() == case.lengths()
    assert all(800 <= p <= 1000 and 160 <= a <= 200 for p, a in case.lengths())
    contexts = [(row.concurrency, row.prompt + row.answer, row.requests) for row in rows()]
    assert contexts == [(64, 8192, 64), (128, 32_768, 128), (1, 4352, 1)]


def test_the_tiny_model_is_measured_and_what_it_cannot_hold_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--scale", "64", "--lengths", "1024:512", "--concurrency", "1", "2", "-o", "json"]
    priced = ["--price", "2", "--price-basis", "of a test"]
    engine = ["--model", str(MODEL), "--max-model-len", "100", "--kv-cache-memory", "8Mi"]
    assert main(["bench", *flags, *priced, *engine]) == 0
    about, *measured = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert about["about"]["price_basis"] == "of a test"
    assert about["about"]["device"]["kind"] == "cpu"
    found = {row["case"]: row for row in measured}
    for case in ("batch 64, context 8K", "batch 128, context 32K"):
        assert "above the limit of 100" in found.pop(case)["skipped"]
    assert list(found) == ["16/8 at 1", "16/8 at 2", "single, context 4K"]
    for (name, row), case in zip(
        found.items(), [*curve([(16, 8)], [1, 2]), rows(64)[2]], strict=True
    ):
        counted = case.lengths()[case.warm_ups :]
        sums = tuple(sum(part) for part in zip(*counted, strict=True))
        assert (row["prompt_tokens"], row["output_tokens"]) == sums, name
        assert row["output_rate"] == near(sums[1] / row["seconds"])
        assert row["dollars_per_million_output"] == near(2 / (row["output_rate"] * 3600e-6))
        assert 0 < row["kv_live_bytes"] < row["kv_pool_bytes"] <= 8 << 20 < row["device_bytes"]
    assert found["16/8 at 1"]["pareto"] or found["16/8 at 2"]["pareto"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lengths", "1024"), "--lengths '1024': give PROMPT:ANSWER"),
        (("--price", "2"), "--price without --price-basis"),
        (("--price", "-2", "--price-basis", "x"), "--price is -2.0: give the dollars"),
        (("--scale", "0"), "--scale is 0"),
        (("--concurrency", "0"), "from 1 on"),
        ((), "give a folder of this machine"),
    ],
)
def test_a_wrong_argument_is_answered_with_its_remedy(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert main(["bench", "--model", "/nowhere/at/all", *flags]) == 2
    assert said in capsys.readouterr().err
