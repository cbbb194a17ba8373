"""Clients as their users install them, unmodified, against a running worker: `make test-clients`.

They live in an environment of their own (locks/clients.txt), because what they pin conflicts with
what we pin. openai-python in its newest version and curl are in `make test`.
"""

import json
from pathlib import Path

import httpx
import pytest

from tests.worker.server.clients.programs import run

SCRIPTS = Path(__file__).with_name("scripts")
MODEL = "qwen3-tiny"
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


def samples(folder: Path, name: str) -> list[dict]:
    """What lm-eval logged of a task, one entry a question."""
    (path,) = folder.rglob(f"samples_{name}_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len(QUESTIONS)
    return found


def test_lm_eval_scores_and_writes_with_the_remote_tokenizer(real, tasks, tmp_path):
    url = f"{real.api}/v1/completions"
    remote = f"model={MODEL},base_url={url},tokenizer_backend=remote,auth_token=k,num_concurrent=4"
    run(
        *("lm_eval", "run", "--model", "local-completions", "--model_args", remote),
        *("--tasks", "tiny_choice,tiny_writing", "--include_path", tasks, "--batch_size", "1"),
        *("--output_path", tmp_path, "--log_samples"),
    )
    for sample in samples(tmp_path, "tiny_choice"):
        for asked, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            expected = score(real, asked["arg_0"], asked["arg_1"])
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-4)
    written = samples(tmp_path, "tiny_writing")
    assert all(response[0] for sample in written for response in sample["resps"])


def test_lm_eval_writes_in_chats(real, tasks, tmp_path):
    url = f"{real.api}/v1/chat/completions"
    run(
        *("lm_eval", "run", "--model", "local-chat-completions"),
        *("--model_args", f"model={MODEL},base_url={url},num_concurrent=4"),
        *("--tasks", "tiny_writing", "--include_path", tasks, "--apply_chat_template"),
        *("--output_path", tmp_path, "--log_samples"),
    )
    for question, sample in zip(QUESTIONS, samples(tmp_path, "tiny_writing"), strict=True):
        message = {"role": "user", "content": question["question"].rstrip()}
        body = {"model": MODEL, "messages": [message], "max_tokens": 12, "temperature": 0}
        reply = httpx.post(url, json=body | {"stop": ["Q"]}, timeout=300)
        assert sample["resps"] == [[reply.json()["choices"][0]["message"]["content"]]]


def test_guidellm_measures_chats_under_load(real, model, tmp_path):
    """It checks each stream, its end and its usage; the worker counts what it was asked for."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    before, requests, length = real.wait_idle()["counters"], 24, 8
    backend = f"kind=openai_http,target={real.api},request_format=/v1/chat/completions"
    run(
        *("guidellm", "run", "--backend", backend, "--disable-console-interactive"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={requests}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={length}"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--output", "kind=json,path=report.json"),
        folder=tmp_path,
    )
    (measured,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = measured["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (requests, 0, 0)
    after = real.wait_idle()["counters"]
    assert after["completions"] - before["completions"] >= requests
    assert after["generated_tokens"] - before["generated_tokens"] >= requests * length


def test_the_worker_is_well_after_all(real):
    assert httpx.get(real.admin + "/readyz").status_code == 200
    assert "Traceback" not in real.log
