"""Clients as their users install them, unmodified, against a running worker: `make test-clients`.

They live in an environment of their own (locks/clients.txt), because what they pin conflicts with
what we pin. openai-python in its newest version and curl are in `make test`.
"""

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[4]
SCRIPTS = Path(__file__).with_name("scripts")
BIN = ROOT / ".venv-clients" / "bin"
MODEL = "qwen3-tiny"
# Nothing here may ask a hub, an index of prices or a collector of statistics.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_API_KEY": "k",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
QUESTIONS = [
    {"question": "A city?", "choices": [" Rome", " blue", " 17"], "answer": 0},
    {"question": "A colour?", "choices": [" Rome", " blue", " 17"], "answer": 1},
    {"question": "Ein Wort mit ü?", "choices": [" Tür", " Tor"], "answer": 0},
    {"question": "A number? " * 20, "choices": [" Rome", " 17"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITING = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["Q"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if not (BIN / "python").exists():
        pytest.fail("the clients are not installed: run `make test-clients`")


def run(program: str, *arguments: object, **extra: str) -> str:
    """Output of a program of the clients' environment, which must succeed."""
    environment = os.environ | QUIET | extra
    command = [str(BIN / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1700)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.parametrize("name", ["langchain", "litellm", "instructor"])
def test_libraries(real, name):
    run("python", SCRIPTS / f"{name}_client.py", real.api, MODEL)
    real.wait_idle()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A multiple choice and a free answer over our own questions."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, rest in (("tiny_choice", CHOICE), ("tiny_writing", WRITING)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)
    return folder


def evaluate(kind: str, arguments: str, names: str, tasks: Path, folder: Path, *more: str):
    """Responses of lm-eval's samples, by task: what the model said to each request."""
    run(
        *("lm_eval", "run", "--model", kind, "--model_args", arguments),
        *("--tasks", names, "--include_path", tasks, "--batch_size", "1"),
        *("--output_path", folder, "--log_samples", *more),
    )
    found = {}
    for name in names.split(","):
        (path,) = folder.rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(samples) == len(QUESTIONS)
        samples.sort(key=lambda sample: sample["doc_id"])
        found[name] = [response for sample in samples for response in sample["resps"]]
    return found


def test_lm_eval_scores_as_transformers_does(real, model, tasks, tmp_path):
    """Its remote tokenizer and log-likelihoods through HTTP against its own run of the weights."""
    url = f"{real.api}/v1/completions"
    remote = f"model={MODEL},base_url={url},tokenizer_backend=remote,auth_token=k,num_concurrent=4"
    names = "tiny_choice,tiny_writing"
    ours = evaluate("local-completions", remote, names, tasks, tmp_path / "ours")
    local = f"pretrained={model},dtype=float32"
    theirs = evaluate("hf", local, names, tasks, tmp_path / "theirs", "--device", "cpu")
    assert ours["tiny_writing"] == theirs["tiny_writing"]
    scores = [float(response[0][0]) for response in ours["tiny_choice"]]
    expected = [float(response[0][0]) for response in theirs["tiny_choice"]]
    assert scores == pytest.approx(expected, abs=1e-3)
    greedy = [response[0][1] for response in ours["tiny_choice"]]
    assert greedy == [response[0][1] for response in theirs["tiny_choice"]]


def test_lm_eval_chats(real, tasks, tmp_path):
    url = f"{real.api}/v1/chat/completions"
    arguments = f"model={MODEL},base_url={url},num_concurrent=4"
    found = evaluate(
        "local-chat-completions",
        arguments,
        "tiny_writing",
        tasks,
        tmp_path,
        "--apply_chat_template",
    )
    assert all(response[0] for response in found["tiny_writing"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_finds_no_error(real, model, tmp_path, path):
    before = real.wait_idle()["counters"]
    run(
        *("guidellm", "run"),
        *("--backend", f"kind=openai_http,target={real.api},request_format={path}"),
        *("--profile", "kind=concurrent,streams=8", "--constraint", "kind=max_requests,count=64"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--tokenizer", f"kind=huggingface_auto,model={model}"),
        *("--output-dir", tmp_path, "--outputs", "json", "--disable-console-interactive"),
    )
    (report,) = tmp_path.rglob("*.json")
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (64, 0)
    after = real.wait_idle()["counters"]
    assert after["errors"] == before["errors"]
    assert after["generated_tokens"] - before["generated_tokens"] >= 64 * 16


def test_the_worker_is_well_after_all(real):
    assert httpx.get(real.admin + "/readyz").status_code == 200
    assert "Traceback" not in real.log
