"""The checked-in example model is whole, small, and what its notes say."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-model"
MODEL = EXAMPLE / "model"
MAX_BYTES, MAX_PARAMETERS = 16 * 2**20, 12_000_000
TEXTS = (
    'The "yield" statement\n    return 12 + x\n',
    "Grüße, 世界 🌍\t\r\n\x00",
    "",
    "  two  blanks   three",
)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_folder_holds_the_layout_within_the_size_limit() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert expected | {"tokenizer_config.json"} == set(files)
    assert sum(files.values()) <= MAX_BYTES


def test_is_qwen3_with_no_weight_missing_and_few_parameters() -> None:
    loaded, report = Qwen3ForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]
    assert loaded.config.tie_word_embeddings
    counted = sum(weight.numel() for weight in loaded.parameters())
    run = json.loads((EXAMPLE / "training" / "run.json").read_text(encoding="utf-8"))
    assert counted == run["parameters"] <= MAX_PARAMETERS


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_vocabulary_matches_the_embedding(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(tokenizer) == model.config.vocab_size
    ends = {tokenizer.decode([token]) for token in model.generation_config.eos_token_id}
    assert ends == {"<|im_end|>", "<|endoftext|>"}
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_chat_template_is_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    token_ids = tokenizer.encode(rendered)
    assert token_ids.count(tokenizer.eos_token_id) == 2


def test_answers_in_prose_and_ends_its_turn(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Greedy answer to a known question: English words, and the end of turn within 150 tokens."""
    prompt = "<|im_start|>user\nWhat is a generator?<|im_end|>\n<|im_start|>assistant\n"
    token_ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        output = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=150,
            do_sample=False,
            temperature=None,
            top_p=None,
        )[0, token_ids.shape[1] :]
    assert output[-1] == tokenizer.eos_token_id
    answer = tokenizer.decode(output, skip_special_tokens=True)
    words = re.findall(r"[A-Za-z]+", answer)
    assert len(words) >= 10
    assert {"the", "a", "is"} & {word.lower() for word in words}
    assert "generator" in answer


def test_manifest_names_each_source_once_with_its_digest() -> None:
    manifest = json.loads((EXAMPLE / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["licence"] == "PSF-2.0"
    paths = [entry["path"] for entry in manifest["files"]]
    assert "pydoc_data/topics.py" in paths
    assert paths == sorted(set(paths))
    for entry in manifest["files"]:
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), entry["path"]
        assert entry["documents"] >= 1
        assert entry["characters"] >= 1


def test_log_is_complete_and_held_out_loss_falls() -> None:
    text = (EXAMPLE / "training" / "log.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    run = json.loads((EXAMPLE / "training" / "run.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in rows] == list(range(1, run["steps"] + 1))
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert held_out[-1] < held_out[0]
    assert run["validation_loss_bfloat16"] == pytest.approx(held_out[-1], abs=0.02)


def test_manifest_is_what_the_corpus_reads(tmp_path: Path) -> None:
    """A library of two files gives exactly their documents and digests; a foreign licence none."""
    (tmp_path / "pydoc_data").mkdir()
    topics = "topics = {'with': 'The \"with\" statement\\n****\\n\\nWraps a block in methods.'}\n"
    (tmp_path / "pydoc_data" / "topics.py").write_text(topics)
    own = f'"""{"A module docstring that is certainly long enough to be kept as text."}"""\n'
    (tmp_path / "own.py").write_text(own)
    (tmp_path / "foreign.py").write_text("# Redistribution and use permitted\n" + own)
    script = (
        "import json, sys; from pathlib import Path; from corpus import documents, manifest\n"
        "library = Path(sys.argv[1]); print(json.dumps(manifest(library, documents(library))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        check=True,
    )
    entries = {entry["path"]: entry["sha256"] for entry in json.loads(result.stdout)}
    assert entries == {
        "own.py": hashlib.sha256(own.encode()).hexdigest(),
        "pydoc_data/topics.py": hashlib.sha256(topics.encode()).hexdigest(),
    }
