"""A model over several processes: transformers' tokens, equal bits, exact parts."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from tests.worker import model_runs, test_quantization
from tests.worker.model_runs import Run, generate
from tests.worker.rank_harness import RANKS, Ranks
from tests.worker.test_families import make
from tilefleet_worker import models
from tilefleet_worker.collectives import Collectives
from tilefleet_worker.dequantize import StoredMatrix
from tilefleet_worker.errors import ConfigError, ModelError
from tilefleet_worker.families import FAMILIES
from tilefleet_worker.kv_cache import block_bytes
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.runner import Runner
from tilefleet_worker.shards import Shard
from tilefleet_worker.step import StepPlan, StepRow
from tilefleet_worker.weights import Weights

BLOCK, ANSWER, VOCABULARY = 4, 5, 163  # 163 rows of the head divide into no equal parts
# 8 heads and inner sizes that 8 divides; 4 heads of keys, so that 8 ranks hold each one twice.
SHAPE = {
    "vocab_size": VOCABULARY, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "intermediate_size": 72, "num_hidden_layers": 2,
}  # fmt: skip
FAMILY_CASES = {
    "llama biased": {},
    "qwen2": {},
    "qwen3": {"max_window_layers": 1},
    "qwen3-moe": {},
    "mistral": {},
    "mixtral": {},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
}
RUN = Run(blocks=128, block_size=BLOCK, params=SamplingParams(max_tokens=ANSWER, temperature=0.0))
PROMPTS = {
    f"r{length}": torch.randint(
        0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(9)
    ).tolist()
    for length in (1, 19, 34)  # one seed: each is a prefix of the next
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Ranks()
    yield made
    torch.set_num_threads(threads)
    assert made.end() == [0] * (RANKS - 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return test_quantization.write_plain(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_ranks_together_make_the_tokens_of_transformers_and_equal_bits(
    ranks: Ranks, case: str, tmp_path: Path
) -> None:
    """Sums over ranks have another order than one process's: logits agree as far as fp32 does, and
    tokens wherever the best two are further apart. In one group's size bits are the same alone, in
    a batch, in chunks and after prefix hits.
    """
    make(case, **SHAPE, **FAMILY_CASES[case]).save_pretrained(tmp_path)
    parts = ranks.parts(tmp_path, BLOCK)
    alone = model_runs.alone(tmp_path, PROMPTS, RUN, parts)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, prompt in PROMPTS.items():
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + alone.tokens[name]])).logits[0]
        for index, token in enumerate(alone.tokens[name]):
            end = len(prompt) + index
            torch.testing.assert_close(
                alone.logits[name, end], expected[end - 1], atol=2e-4, rtol=1e-4
            )
            best = expected[end - 1].topk(2)
            clear = best.values[0] - best.values[1] > 4e-4
            assert token in (best.indices[:1] if clear else best.indices).tolist()
    for run in (replace(RUN, budget=7), replace(RUN, caching=True, rounds=2)):
        made = generate(tmp_path, PROMPTS, run, parts)
        assert made.tokens == alone.tokens
        assert made.largest_batch == 3
        assert made.counts["prompt_tokens_cached"] > 30 or not run.caching
        assert made.differing(alone.logits) == []


def test_every_family_has_a_case_for_ranks() -> None:
    covered = {case.split()[0] for case in FAMILY_CASES}
    titles = ["llama", "qwen2", "qwen3", "qwen3-moe", "mistral", "mixtral", "gemma3"]
    assert len(titles) == len(FAMILIES)
    assert covered == set(titles)


def first_logits(runner: Runner, tokens: list[int]) -> torch.Tensor:
    params = SamplingParams(max_tokens=1, temperature=0.0)
    row = StepRow("a", 0, tuple(tokens), tuple(range(10)), True, params, 0)
    return runner.logits(StepPlan.of([row]))[0]


@pytest.mark.skipif(RANKS != 2, reason="the quantised model has 4 heads and 2 of keys")
@pytest.mark.parametrize("form", ["fp8 tensor", "compressed int8 channel"])
def test_quantised_matrices_are_divided_with_their_scales(
    ranks: Ranks,
    plain: Path,
    tmp_path: Path,
    form: str,
) -> None:
    quantized, _ = test_quantization.quantize(plain, tmp_path, form)
    parts = ranks.parts(quantized, BLOCK)
    made = first_logits(Runner(parts.model, parts.cache, parts.attention), test_quantization.PROMPT)
    torch.testing.assert_close(made, test_quantization.logits(quantized), atol=2e-4, rtol=1e-4)


def test_a_token_that_no_model_has_is_refused_before_any_rank_computes(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Else one request could break the sums of all."""
    make("llama biased", **SHAPE).save_pretrained(tmp_path)
    parts = ranks.parts(tmp_path, BLOCK)
    runner = Runner(parts.model, parts.cache, parts.attention)
    before = first_logits(runner, [1, 2, 3])
    with pytest.raises(IndexError, match="outside 0 … 162"):
        first_logits(runner, [1, VOCABULARY, 3])
    assert first_logits(runner, [1, 2, 3]).equal(before)
    assert ranks.group.failure is None


def test_a_split_block_of_scales_is_refused(plain: Path, tmp_path: Path) -> None:
    """56 inner features over two ranks are 28 each, but 16 rows share a scale."""
    quantized, _ = test_quantization.quantize(plain, tmp_path, "fp8 blocks")
    config = ModelConfig.from_folder(quantized)
    collectives = Collectives(1, 2, torch.device("cpu"))
    with Weights(quantized) as weights, pytest.raises(ModelError) as refused:
        models.load(config, weights, 64, collectives=collectives)
    message = str(refused.value)
    assert "gate_proj.weight" in message
    assert "a cut at 28 or 56 splits a block of 16" in message
    assert "--tensor-parallel-size" in message


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (3, "num_attention_heads is 4, no multiple of 3; num_key_value_heads is 2, which must be "
            "a multiple or a divisor of 3; intermediate_size is 56, no multiple of 3; the experts' "
            "intermediate size is 40, no multiple of 3. Use a size that divides them: 1, 2."),
        (8, "num_attention_heads is 4, no multiple of 8. Use a size that divides them: 1, 2, 4."),
    ],
)  # fmt: skip
def test_a_size_that_does_not_divide_the_model_is_refused(
    plain: Path,
    size: int,
    words: str,
) -> None:
    config = ModelConfig.from_folder(plain)
    with pytest.raises(ConfigError) as refused:
        Shard(0, size).config(config)
    assert str(refused.value).startswith(f"--tensor-parallel-size is {size}, but this Qwen3Moe")
    assert str(refused.value).endswith(words)


@given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))
def test_shares_cover_everything_once_and_heads_of_keys_where_they_are_read(
    vocabulary: int, size: int, key_heads: int
) -> None:
    shards = [Shard(rank, size) for rank in range(size)]
    rows = [row for s in shards for row in range(vocabulary)[s.vocabulary(vocabulary)]]
    assert rows == list(range(vocabulary))
    heads = list(range(16))
    assert [head for s in shards for head in heads[s.part(16)]] == heads
    config = replace(CONFIG, num_heads=16, num_kv_heads=key_heads, head_dim=2)
    for shard in shards:
        rows_of_keys = range(2 * key_heads)[shard.keys(config)]
        keys = [row // 2 for row in rows_of_keys[::2]]
        assert len(keys) == shard.config(config).num_kv_heads
        read = [head * key_heads // 16 for head in heads[shard.part(16)]]
        group = 16 // size // len(keys)
        assert read == [key for key in keys for _ in range(group)]
    assert block_bytes(shards[0].config(config), 4) * size >= block_bytes(config, 4)


CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16,
        "max_position_embeddings": 16,
    }, {}, "test",
)  # fmt: skip


@given(st.data())
def test_a_part_of_a_stored_matrix_is_that_part_of_its_values(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    height, width = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 14))
    random = np.random.default_rng(0)
    down, across = -(-rows // height), -(-columns // width)
    stored = StoredMatrix(
        torch.from_numpy(random.integers(-9, 9, (rows, columns))).to(torch.int8),
        torch.from_numpy(random.random((down, across), np.float32)),
        torch.from_numpy(random.integers(-9, 9, (down, across))).to(torch.int8),
        (height, width),
    )
    rows_cut, row_splits = cut_of(data, rows, height)
    columns_cut, column_splits = cut_of(data, columns, width)
    if row_splits or column_splits:
        with pytest.raises(ValueError, match="splits a block of"):
            stored.part((rows_cut, columns_cut))
        return
    made = stored.part((rows_cut, columns_cut)).dequantized()
    assert made.equal(stored.dequantized()[rows_cut, columns_cut])


def cut_of(data: st.DataObject, size: int, step: int) -> tuple[slice, bool]:
    """A part of a dimension, and whether it splits one of several blocks."""
    first = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(first + 1, size))
    whole_blocks = first % step == 0 and (end % step == 0 or end == size)
    return slice(first, end), size > step and not whole_blocks
