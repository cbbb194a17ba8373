"""A worker of two ranks as its image starts it: same answers, whole accounts, and its end."""

import os
import signal
from pathlib import Path

import httpx

BODY = {"model": "qwen3-tiny", "prompt": "The quick", "max_tokens": 8, "temperature": 0}


def ranks_of(pid):
    """Processes that a worker started as ranks."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(word) for path in children for word in path.read_text().split()]
    return [child for child in found if b"rank" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_two_ranks_answer_as_one_and_die_as_one(real, model, start_real):
    flags = ["--kv-cache-memory", "4Mi", "--threads", "2", "--tensor-parallel-size", "2"]
    worker = start_real("--model", f"file://{model}", *flags).wait_ready()
    url = "/v1/completions"
    alone = httpx.post(real.api + url, json=BODY, timeout=60).json()
    shared = httpx.post(worker.api + url, json=BODY, timeout=60).json()
    assert shared["choices"][0]["text"] == alone["choices"][0]["text"]

    config, pool = worker.stats()["config"], httpx.get(worker.admin + "/kv").json()
    assert config["tensor_parallel_size"] == 2
    assert config["kv_bytes_per_rank"] * 2 == pool["total"]
    # One of the two heads of keys each: a block is as large as one process's.
    assert pool["block_bytes"] == httpx.get(real.admin + "/kv").json()["block_bytes"]

    (rank,) = ranks_of(worker.process.pid)
    os.kill(rank, signal.SIGTERM)  # the worker's to take, not the rank's
    endless = BODY | {"max_tokens": 1900, "ignore_eos": True, "stream": True}
    text = ""
    with httpx.stream("POST", worker.api + url, json=endless, timeout=200) as reply:
        for number, chunk in enumerate(reply.iter_text()):
            text += chunk
            if number == 3:
                os.kill(rank, signal.SIGKILL)
    assert '"error"' in text
    assert worker.process.wait(60) == 1
    worker.reader.join()
    assert "rank 1 of 2 was killed by signal 9 (SIGKILL)" in worker.log
