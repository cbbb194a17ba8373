"""The launcher's answers must reach who asked: a fault is a signal to exactly one process."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.faults.operators import Launcher


async def test_a_start_that_nobody_waits_for_any_more_gives_its_process_to_nobody(
    tmp_path: Path,
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    # Nothing listens on port 1 of the loopback: an operator waits for its Lease for ever.
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    user = {"name": "u", "user": {"token": "t"}}
    document = {"clusters": [cluster], "contexts": [context], "users": [user]}
    kubeconfig.write_text(json.dumps(document | {"current-context": "c"}))
    argv = ["run", f"--kubeconfig={kubeconfig}", "--probe-port=0", "--metrics-port=0"]
    images = ["--worker-cpu-image=worker:1", "--worker-image=worker:1"]
    left, kept = tmp_path / "left.log", tmp_path / "kept.log"
    async with Launcher.running() as launcher:
        unwanted = asyncio.create_task(launcher.start([*argv, *images], left))
        await asyncio.sleep(0)
        unwanted.cancel()
        pid, end = await launcher.start([*argv, *images], kept)
        await _until(lambda: _output(pid) == str(kept))
        await _until(lambda: _children(launcher.process.pid) == [pid])
        assert not end.done()


def _output(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/fd/1")


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.05)
