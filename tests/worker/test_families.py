"""Every family and rotary embedding: transformers' tokens, and equal bits in every company."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from tests.worker import model_runs
from tests.worker.model_runs import Made, Run, generate, load
from tilefleet_worker import attention, models
from tilefleet_worker.families import FAMILIES
from tilefleet_worker.kv_cache import KVCache
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.rope_config import ROPE_KINDS
from tilefleet_worker.runner import Runner
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.step import StepPlan, StepRow
from tilefleet_worker.weights import Weights

BLOCK, ANSWER, VOCABULARY = 4, 12, 160
ONE = Run(blocks=128, block_size=BLOCK, params=SamplingParams(max_tokens=ANSWER, temperature=0.0))
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 6}

# name → (transformers' architecture, what differs from SHAPE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 24, "num_key_value_heads": 4}),
    "llama biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "head_dim": None}),
    "llama linear": ("Llama", {"rope": {"rope_type": "linear", "factor": 3.0}}),
    "llama dynamic": ("Llama", {"rope": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama llama3": (
        "Llama",
        {"rope": {"rope_type": "llama3", "original_max_position_embeddings": 40, **LLAMA3}},
    ),
    "llama yarn": (
        "Llama",
        {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3 yarn": (
        "Qwen3",
        {"rope": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8.0, "truncate": False}},
    ),
    "qwen3-moe": ("Qwen3Moe", {"norm_topk_prob": True, "mlp_only_layers": [1], **EXPERTS}),
    "qwen3-moe shares": ("Qwen3Moe", {"norm_topk_prob": False, **EXPERTS}),
    "mistral": ("Mistral", {}),
    "mistral full": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3": (
        "Gemma3Text",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 20,
            "rope": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3 capped": ("Gemma3Text", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 24,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPTS = {
    f"r{length}": torch.randint(
        0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(9)
    ).tolist()
    for length in (1, 19, 34, 70, 130)  # one seed: each is a prefix of the next
}


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def make(case: str, **more: Any) -> Any:
    """A random model of transformers. Norms and biases are random too: ones would hide a bug."""
    name, changes = CASES[case]
    changes = {**changes, **more}
    rope = {"rope_theta": 1e4, **changes.get("rope", {"rope_type": "default"})}
    values = {**SHAPE, "rope_parameters": rope, **changes}
    values.pop("rope", None)
    if name == "Gemma3Text":
        values["rope_parameters"] = changes.get("rope")
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**values)
    architecture = name.removesuffix("Text") + "ForCausalLM"
    model = getattr(transformers, architecture)(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=0.7, std=0.3)
    return model


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make(request.param).save_pretrained(path)
    return path


@lru_cache
def alone(folder: Path) -> Made:
    return model_runs.alone(folder, PROMPTS, ONE)


def test_greedy_tokens_and_logits_are_those_of_transformers(folder: Path) -> None:
    """One pass over prompt and answer: its best next token is ours at every place, so by induction
    greedy decoding makes the same answer.
    """
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, logits = alone(folder).tokens, alone(folder).logits
    for name, prompt in PROMPTS.items():
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + tokens[name]])).logits[0]
        best = expected[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert tokens[name] == best, name
        for end in range(len(prompt), len(prompt) + ANSWER):
            torch.testing.assert_close(logits[name, end], expected[end - 1], atol=2e-4, rtol=1e-4)


class Preempting:
    """Takes the blocks of the request whose turn is last, at every seventh step."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, scheduler: Scheduler) -> None:
        self.steps += 1
        running = scheduler._roster.running
        if self.steps % 7 == 0 and running:
            scheduler._roster.preempt(running[-1])
        scheduler.check_integrity()


def test_bits_do_not_depend_on_company_chunks_preemption_or_hits(folder: Path) -> None:
    expected = alone(folder)
    runs = {
        "together": ONE,
        "chunks": replace(ONE, budget=7),
        "preempted": replace(ONE, budget=37, after_step=Preempting()),
        "prefix hits": replace(ONE, caching=True, rounds=2),
    }
    for name, run in runs.items():
        made = generate(folder, PROMPTS, run)
        assert made.tokens == expected.tokens, name
        assert made.counts["preemptions"] > 0 or name != "preempted"
        assert made.counts["prompt_tokens_cached"] > 100 or name != "prefix hits"
        assert made.differing(expected.logits) == [], name


@pytest.mark.parametrize("case", ["llama biased", "qwen3", "qwen3-moe", "gemma3"])
def test_a_model_computes_in_bf16_as_on_a_gpu(case: str, tmp_path: Path) -> None:
    """The path without packed maps and folded norms, which any device takes. bf16 keeps 8 bits:
    logits differ from fp32 by a few of them.
    """
    make(case).save_pretrained(tmp_path)
    config, exact = load(tmp_path)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    plan = StepPlan.of([StepRow("a", 0, tuple(PROMPTS["r34"]), tuple(range(9)), True, params, 0)])
    backend = attention.create("reference", config)
    with torch.inference_mode(), Weights(tmp_path) as weights:
        model = models.load(config, weights, config.max_positions, dtype=torch.bfloat16)
    cache = KVCache(config, 9, BLOCK, torch.bfloat16)
    made = Runner(model, cache, backend).logits(plan)[0]
    expected = Runner(exact, KVCache(config, 9, BLOCK), backend).logits(plan)[0]
    assert made.dtype == torch.float32
    error = (made - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05


def test_the_text_part_of_gemma_3_is_served(tmp_path: Path) -> None:
    text = {**SHAPE, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(4)
    config = transformers.Gemma3Config(
        text_config={**text, "tie_word_embeddings": True, "query_pre_attn_scalar": 16},
        vision_config={**vision, "num_attention_heads": 1, "image_size": 28, "patch_size": 14},
    )
    reference = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    reference.save_pretrained(tmp_path)
    made = generate(tmp_path, {"r34": PROMPTS["r34"]}, ONE)
    tokens, logits = made.tokens, made.logits
    sequence = PROMPTS["r34"] + tokens["r34"]
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([sequence])).logits[0]
    assert tokens["r34"] == expected[33:-1].argmax(-1).tolist()
    torch.testing.assert_close(logits["r34", 40], expected[39], atol=2e-4, rtol=1e-4)


def test_every_family_and_rotary_kind_has_a_case() -> None:
    architectures = {name.removesuffix("Text") + "ForCausalLM" for name, _ in CASES.values()}
    assert all(architectures & set(family.architectures) for family in FAMILIES)
    kinds = {changes.get("rope", {}).get("rope_type", "default") for _, changes in CASES.values()}
    assert kinds == set(ROPE_KINDS)
