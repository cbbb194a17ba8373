"""Rolls and scale-downs under open streams: none is cut, each equals its undisturbed run.

ROLLS says how many of each (1 in `make test`, 20 in `make test-rolls`).
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fleets import cpu_fleet
from testbed import Json, Testbed, condition, is_ready, until

ROLLS = int(os.environ.get("ROLLS", "1"))
CLIENTS, MAX_TOKENS, REPLICAS = 60, 64, 2
# One stream of all takes this long at worst on a busy machine of two cores.
STEP_SECONDS = 600
HISTORY = 1


class Clients:
    """The running clients and what they said so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.lines = process, list[dict[str, Any]]()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def close(self) -> None:
        """Free the pipe of clients that have ended."""
        self.reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def said(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def wait_undisturbed(self) -> None:
        def look() -> tuple[bool | None, str]:
            assert self.process.poll() is None, "the clients ended"
            return (True if self.said("undisturbed") else None), str(self.lines[-1:])

        until("every client has its undisturbed answer", look, STEP_SECONDS, every=1)

    def end(self) -> dict[str, Any]:
        """Let the open streams end; the counts."""
        self.process.terminate()
        self.process.wait(STEP_SECONDS)
        self.reader.join(10)
        (counts,) = self.said("end")
        return counts


@contextmanager
def clients(testbed: Testbed, fleet: str, namespace: str) -> Iterator[Clients]:
    with testbed.endpoint(fleet, namespace) as url:
        process = testbed.start(
            *(sys.executable, "-u", "tests/e2e/streams.py", f"{url}/v1", fleet),
            *("--clients", str(CLIENTS), "--max-tokens", str(MAX_TOKENS)),
            stdout=subprocess.PIPE,
        )
        running = Clients(process)
        try:
            yield running
        finally:
            process.kill()
            process.wait()
            running.close()


def fleet(namespace: str, tokens: int = 1024, replicas: int = REPLICAS) -> Json:
    spec: Json = {
        "engine": {"maxBatchTokens": tokens, "maxConcurrent": 64},
        "rollout": {"drain": {"timeout": f"{STEP_SECONDS}s"}, "revisionHistoryLimit": HISTORY},
    }
    return cpu_fleet("rolls", namespace, replicas, spec)


class Watch:
    """Looks at the fleet until it rests, and remembers the fewest replicas that served."""

    def __init__(self, testbed: Testbed, namespace: str) -> None:
        self.testbed, self.namespace = testbed, namespace
        self.fewest_ready = REPLICAS

    def rest(self, what: str, replicas: int) -> Json:
        """The object once all replicas have its revision and nothing drains any more."""

        def look() -> tuple[Json | None, str]:
            found = self.testbed.get("infd", "rolls", self.namespace) or {}
            pods = self.testbed.pods("rolls", self.namespace)
            serving = [p for p in pods if is_ready(p) and state(p) == "active"]
            self.fewest_ready = min(self.fewest_ready, len(serving))
            status = found.get("status") or {}
            current = status.get("observedGeneration") == found["metadata"]["generation"]
            new = {p["metadata"]["labels"]["tilefleet.io/revision"] for p in pods}
            rests = (
                current
                and len(serving) == len(pods) == replicas
                and new == {status["updateRevision"]} == {status["currentRevision"]}
            )
            why = f"{[(p['metadata']['name'], state(p)) for p in pods]} {condition(found, 'Ready')}"
            return (found if rests else None), why

        return until(what, look, STEP_SECONDS, every=1)


def state(pod: Json) -> str:
    return str(pod["metadata"]["labels"]["tilefleet.io/state"])


def test_no_stream_is_cut_by_rolls_and_scale_downs(testbed: Testbed, namespace: str) -> None:
    if not testbed.is_local:
        pytest.skip("a forwarded port reaches one pod, not the Service that the rolls change")
    testbed.apply(fleet(namespace))
    testbed.wait_ready("rolls", namespace)
    watch = Watch(testbed, namespace)
    with clients(testbed, "rolls", namespace) as running:
        running.wait_undisturbed()
        for number in range(1, ROLLS + 1):
            tokens = 1024 + number
            testbed.apply(fleet(namespace, tokens))
            watch.rest(f"roll {number} of {ROLLS}", REPLICAS)
            testbed.apply(fleet(namespace, tokens, REPLICAS + 1))
            watch.rest(f"scale-up {number} of {ROLLS}", REPLICAS + 1)
            testbed.apply(fleet(namespace, tokens, REPLICAS))
            watch.rest(f"scale-down {number} of {ROLLS}", REPLICAS)
            print(f"{number} rolls, {number} scale-downs, faults {running.said('fault')}")
            assert running.said("fault") == []
        counts = running.end()
    print(f"{ROLLS} rolls and {ROLLS} scale-downs under {CLIENTS} streams: {counts}")
    assert running.process.returncode == 0
    assert counts["equal"] >= CLIENTS
    assert watch.fewest_ready == REPLICAS, "fewer served than maxUnavailable 0 allows"
    records = testbed.find("controllerrevisions", namespace)
    # the present one, and as many earlier ones as rollout.revisionHistoryLimit says
    assert len(records) == 1 + min(HISTORY, ROLLS)
