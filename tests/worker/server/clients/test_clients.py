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


def score(real, context: str, continuation: str) -> float:
    """Log-likelihood of a continuation, asked for directly. The tokens are bytes.

    lm-eval counts spaces at the end of a context as a part of the continuation.
    """
    body = {"model": MODEL, "prompt": context + continuation, "echo": True, "logprobs": 1}
    url = real.api + "/v1/completions"
    reply = httpx.post(url, json=body | {"max_tokens": 1, "temperature": 0}, timeout=300)
    logprobs = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
    return sum(logprobs[len(context.rstrip().encode()) : -1])


def test_lm_eval_scores_and_writes_with_the_remote_tokenizer(real, tasks, tmp_path):
    url = f"{real.api}/v1/completions"
    remote = f"model={MODEL},base_url={url},tokenizer_backend=remote,auth_token=k,num_concurrent=4"
    names = "tiny_choice,tiny_writing"
    run(
        *("lm_eval", "run", "--model", "local-completions", "--model_args", remote),
        *("--tasks", names, "--include_path", tasks, "--batch_size", "1"),
        *("--output_path", tmp_path, "--log_samples"),
    )
    found = {}
    for name in names.split(","):
        (path,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(found[name]) == len(QUESTIONS)
    for sample in found["tiny_choice"]:
        for asked, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            expected = score(real, asked["arg_0"], asked["arg_1"])
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-4)
    assert all(response[0] for sample in found["tiny_writing"] for response in sample["resps"])


def test_the_worker_is_well_after_all(real):
    assert httpx.get(real.admin + "/readyz").status_code == 200
    assert "Traceback" not in real.log
