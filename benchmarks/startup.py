"""How long a worker takes from exec to its first probe and to ready, beside the disk's floor.

python benchmarks/startup.py [--model DIR] [--turns 3]

Cases: `import` of torch in the worker, `exec_to_startupz` (the process serves), `exec_to_ready`
(weights loaded, warmed up, two real tokens decoded). The peer of `exec_to_ready` is the floor: the
weight bytes over the rate at which this disk (or its cache) reads them, measured in the same run.
Medians of turns; one JSON line a case.
"""

import argparse
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.01
LIMIT_SECONDS = 300


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    end = time.perf_counter() + LIMIT_SECONDS
    while not answers(url):
        if process.poll() is not None or time.perf_counter() > end:
            raise SystemExit(f"the worker did not answer {url}; exit status {process.poll()}")
        time.sleep(POLL_SECONDS)


def admin_port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"admin port (\d+)", line)
        if found:
            return int(found[1])
    raise SystemExit(f"the worker did not listen; exit status {process.wait()}")


def one_start(model: Path) -> dict[str, float]:
    """Seconds of one start, by case."""
    command = [sys.executable, "-m", "tilefleet_worker", "serve", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--removal-delay", "0s"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        admin = f"http://127.0.0.1:{admin_port(process)}"
        wait_for(admin + "/startupz", process)
        serves = time.perf_counter() - began
        wait_for(admin + "/readyz", process)
        ready = time.perf_counter() - began
        with urllib.request.urlopen(admin + "/stats", timeout=10) as reply:
            phases = {p["phase"]: p["seconds"] for p in json.load(reply)["startup"]}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return {"import": phases["import"], "exec_to_startupz": serves, "exec_to_ready": ready}


def floor_seconds(model: Path) -> float:
    """Seconds that only reading the weight files takes."""
    began = time.perf_counter()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(2**20):
                pass
    return time.perf_counter() - began


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-model/model")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    turns, floors = [], []
    for _ in range(options.turns):
        floors.append(floor_seconds(options.model))
        turns.append(one_start(options.model))
    floor = statistics.median(floors)
    for case in turns[0]:
        value = statistics.median(turn[case] for turn in turns)
        row = {"bench": "startup", "case": case, "value": round(value, 4), "unit": "s"}
        if case == "exec_to_ready":
            row |= {"peer": "read the weight files", "peer_value": round(floor, 6)}
            row["ratio"] = round(value / floor, 2) if floor else None
        else:
            row |= {"peer": None, "peer_value": None, "ratio": None}
        row |= {"device": f"cpu {platform.machine()}", "commit": commit()}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
