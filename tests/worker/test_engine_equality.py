"""Tokens equal those of transformers, and equal bits whatever else runs: the engine's promise."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from tests.worker import model_runs
from tests.worker.model_runs import BITS_PROMISED, Made, Run, generate, load
from tilefleet_worker import attention
from tilefleet_worker.attention.base import AttentionStep
from tilefleet_worker.batch import Batch
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.request import Request, SamplingParams, TokenLogprob
from tilefleet_worker.runner import Runner
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.step import StepPlan, StepRow

TRAINED = Path(__file__).parents[2] / "examples" / "tiny-model" / "model"
BLOCK = 16
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied-bias": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "num_attention_heads": 6,
        "initializer_range": 0.05,
    },
}


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_single() -> Iterator[None]:
    """One thread: the pool's idle threads spin, which on a shared machine costs tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def write_model(folder: Path, **changes: object) -> Path:
    torch.manual_seed(7)
    config = Qwen3Config(
        **{
            "vocab_size": 512,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **changes,
        }
    )
    model = Qwen3ForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):  # else all ones and zeros would hide a bug
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each: with `folder` alone pytest would make a model anew for each parameter of a test,
    and `alone` its answers.
    """
    made = {n: write_model(tmp_path_factory.mktemp("model"), **v) for n, v in VARIANTS.items()}
    return made | {"trained": TRAINED}


@pytest.fixture(params=[*VARIANTS, "trained"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@lru_cache
def prompts(vocab_size: int) -> dict[str, list[int]]:
    """16 prompts from 1 to 330 tokens; every other pair shares its first half."""
    generator = torch.Generator().manual_seed(3)
    made: dict[str, list[int]] = {}
    lengths = (1, 2, 3, 15, 16, 17, 31, 33, 48, 64, 90, 128, 190, 200, 255, 330)
    previous: list[int] = []
    for index, length in enumerate(lengths):
        shared = previous[: length // 2] if index % 2 else []
        fresh = torch.randint(0, vocab_size, (length - len(shared),), generator=generator)
        previous = shared + fresh.tolist()
        made[f"r{index:02}"] = previous
    return made


def prompts_of(folder: Path, names: list[str]) -> dict[str, list[int]]:
    config, _ = load(folder)
    return {name: prompts(config.vocab_size)[name] for name in names}


ALL = [f"r{index:02}" for index in range(16)]


@lru_cache
def alone(folder: Path) -> Made:
    return model_runs.alone(folder, prompts_of(folder, ALL), Run())


def test_greedy_tokens_equal_those_of_transformers(folder: Path) -> None:
    """One pass over prompt and answer: its best next token is ours at every place, so by induction
    greedy decoding makes the same answer.
    """
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = alone(folder).tokens
    for name, prompt in prompts(reference.config.vocab_size).items():
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + tokens[name]])).logits[0]
        assert tokens[name] == expected[len(prompt) - 1 : -1].argmax(-1).tolist(), name


def test_logits_agree_with_the_reference_backend(folder: Path) -> None:
    some, params = prompts_of(folder, ["r02", "r07", "r14"]), SamplingParams(8, temperature=0.0)
    fast = generate(folder, some, Run(params=params))
    slow = generate(folder, some, Run(params=params, backend="reference"))
    for key, logits in slow.logits.items():
        torch.testing.assert_close(fast.logits[key], logits, atol=2e-4, rtol=1e-4)


CASES = {
    "all together": Run(),
    "chunks of 8 tokens": Run(budget=8),
    "chunks of 100 tokens, three at a time": Run(budget=100, concurrent=3),
    "cache hits": Run(caching=True, rounds=2),
    "small pool": Run(blocks=60, budget=37),
    "small pool with cache and host memory": Run(
        blocks=60, budget=50, caching=True, rounds=2, host_blocks=90
    ),
    "speculative": Run(drafts=5),
    "speculative, small pool with cache": Run(
        blocks=60, budget=50, caching=True, rounds=2, drafts=3
    ),
}


@pytest.mark.parametrize(
    ("folder", "case"),
    [
        *(("tied", case) for case in CASES),
        ("untied-bias", "all together"),
        # real text repeats itself in more ways than random weights do, which matters to these
        *(("trained", case) for case in CASES if "speculative" in case or "cache" in case),
    ],
    indirect=["folder"],
)
def test_bits_do_not_depend_on_company_chunks_preemption_or_hits(folder: Path, case: str) -> None:
    made, expected = generate(folder, prompts_of(folder, ALL), CASES[case]), alone(folder)
    assert made.tokens == expected.tokens
    if "small pool" in case:
        assert made.counts["preemptions"] > 0
    if "cache" in case:
        assert made.counts["prompt_tokens_cached"] > 300
    if "host" in case:
        assert made.counts["blocks_brought_back"] > 20
    if "speculative" in case:
        assert made.counts["accepted_tokens"] > 20
    assert made.largest_batch >= 3
    assert made.differing(expected.logits) == []


@pytest.mark.parametrize("folder", ["trained"], indirect=True)
def test_drawn_tokens_do_not_depend_on_speculation(folder: Path) -> None:
    """Each position draws its own number, whether or not a draft stood there."""
    params = SamplingParams(max_tokens=48, temperature=0.4, top_k=4, top_p=0.95, seed=11)
    some = prompts_of(folder, ALL[:12])
    plain = generate(folder, some, Run(params=params))
    guessed = generate(folder, some, Run(params=params, drafts=4))
    assert guessed.tokens == plain.tokens
    assert 0 < guessed.counts["accepted_tokens"] < guessed.counts["draft_tokens"]
    assert guessed.differing(plain.logits) == []


def test_the_probe_of_batch_invariance_sees_a_backend_that_lacks_it(folder: Path) -> None:
    config, model = load(folder)
    cache = KVCache(config, 8, BLOCK)
    runner = Runner(model, cache, attention.create("cpu", config))
    assert runner.batch_invariant() or not BITS_PROMISED

    class Drifting:
        def forward(self, batch: Batch, step: Sequence[AttentionStep], kv: KVCache) -> torch.Tensor:
            return model.forward(batch, step, kv) * (1 + 1e-6 * len(batch.sampled))

    assert not Runner(Drifting(), cache, attention.create("cpu", config)).batch_invariant()


def test_a_row_run_again_changes_nothing(folder: Path) -> None:
    """The engine runs rows again, one by one, to find a faulty one."""
    config, model = load(folder)
    runner = Runner(model, KVCache(config, 8, BLOCK), attention.create("cpu", config))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    row = StepRow("a", 0, (5, 6, 7), (0,), True, params, 0)
    first = runner.logits(StepPlan.of([row]))
    assert runner.logits(StepPlan.of([row])).equal(first)


def test_what_a_faulty_request_left_in_a_block_reaches_nobody(folder: Path) -> None:
    config, model = load(folder)
    cache = KVCache(config, 4, BLOCK)
    runner = Runner(model, cache, attention.create("cpu", config))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    row = StepRow("a", 0, (5, 6, 7), (2,), True, params, 0)
    clean = runner.logits(StepPlan.of([row]))
    cache.layer(1)[:, 2] = torch.nan
    poisoned = StepRow("bad", 3, (5,), (2,), True, params, 0)
    result = runner.run(StepPlan.of([poisoned, StepRow("good", 0, (5, 6), (3,), True, params, 0)]))
    assert "not finite" in result.faults["bad"]
    assert set(result.tokens) == {"good"}
    assert runner.logits(StepPlan.of([row])).equal(clean)


def test_scores_of_a_prompt_are_those_of_transformers(folder: Path) -> None:
    """In chunks, next to another request: each log probability, and so each rank, is the same."""
    config, model = load(folder)
    runner = Runner(model, KVCache(config, 64, BLOCK), attention.create("cpu", config))
    pool = BlockPool(64, BLOCK)
    scheduler = Scheduler(pool, 40, 8, config.max_positions, vocab_size=config.vocab_size)
    prompt = prompts(config.vocab_size)["r10"]
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=3)
    scheduler.add(Request("other", prompt[:50], SamplingParams(max_tokens=30), 0.0))
    scheduler.add(Request("scored", prompt, params, 0.0))
    found: list[TokenLogprob] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        for delta in scheduler.commit(plan, runner.run(plan)):
            found.extend(delta.prompt_logprobs)
    theirs = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(theirs(torch.tensor([prompt])).logits[0].double(), dim=-1)
    assert [score.token_id for score in found] == prompt[1:]
    for place, score in enumerate(found):
        assert abs(score.logprob - float(expected[place, score.token_id])) < 1e-3
        assert abs(score.top[0][1] - float(expected[place].max())) < 1e-3
