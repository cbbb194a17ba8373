"""Operator processes under faults: started, killed, frozen, put into another time, started again.

A Supervisor does what the kubelet does for the operator's pod: a process that ends is started anew.
"""

import asyncio
import itertools
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.faults.proxy import Candidate, FaultProxy
from tests.operator.apiserver import ROOT, ApiServer

LEASE_SECONDS = 10.0
"""As the operator's own default."""
NAMESPACE = "faults"
"""Where all operators live, each group with a Lease of its own."""
_NUMBERS = itertools.count()


class Launcher:
    """Forks operators from one process that has imported them already; see launcher.py."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._numbers = itertools.count()
        self._started: dict[int, asyncio.Future[int]] = {}
        self._ends: dict[int, asyncio.Future[int]] = {}

    @classmethod
    @asynccontextmanager
    async def running(cls, shim: Path | None = None) -> AsyncIterator["Launcher"]:
        """A launcher; its children end with it. shim: preloaded, see build_clock_shim."""
        environment = {**os.environ, **({"LD_PRELOAD": str(shim)} if shim else {})}
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "tests" / "faults" / "launcher.py"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip
        launcher = cls(process)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(launcher._read())
            try:
                yield launcher
            finally:
                reader.cancel()
                assert process.stdin is not None
                process.stdin.close()
                await process.wait()

    async def start(
        self, argv: Sequence[str], log: Path, clock: Path | None = None
    ) -> tuple[int, asyncio.Future[int]]:
        """PID, and the future exit status (negative: a signal).

        The answer is found by a number: who stops waiting for one must leave it to nobody else, and
        the process that it names is then ended.
        """
        assert self.process.stdin is not None
        number = next(self._numbers)
        started = self._started[number] = asyncio.get_running_loop().create_future()
        command: dict[str, Any] = {"number": number, "argv": list(argv), "log": str(log)}
        if clock is not None:
            command["clock"] = str(clock)
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        try:
            pid = await asyncio.shield(started)
        except asyncio.CancelledError:
            started.add_done_callback(lambda found: os.kill(found.result(), signal.SIGKILL))
            raise
        return pid, self._ends[pid]

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            said = json.loads(line)
            if "pid" in said:
                self._ends[said["pid"]] = asyncio.get_running_loop().create_future()
                self._started.pop(said["number"]).set_result(said["pid"])
            else:
                self._ends.pop(said["ended"]).set_result(said["status"])
        raise RuntimeError(f"the launcher ended: {await self.process.wait()}")


class Clock:
    """How far the wall clock of one process is off, in a file that its preloaded shim reads."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_bytes(struct.pack("d", 0.0))

    def jump(self, seconds: float) -> None:
        """Set the clock this far from the truth."""
        with self.file.open("r+b") as opened, mmap.mmap(opened.fileno(), 8) as shared:
            shared[:8] = struct.pack("d", seconds)


class Supervisor:
    """One replica of the operator's Deployment: a process, and its successor when it ends."""

    def __init__(
        self,
        api: ApiServer,
        proxy: FaultProxy,
        launcher: Launcher,
        namespaces: Sequence[str],
        user: str,
        lease_seconds: float,
        logs: Path,
    ) -> None:
        self.lease_seconds = lease_seconds
        self.api, self.proxy, self.launcher = api, proxy, launcher
        self.namespaces, self.user = tuple(namespaces), user
        self.name = f"{self.namespaces[0]}-{user}-{next(_NUMBERS)}"
        self.log = logs / f"{self.name}.log"
        self._log_begins = self.log.stat().st_size if self.log.exists() else 0
        self.clock: Clock | None = None
        self.exits: list[int] = []
        self.candidate: Candidate | None = None

    @asynccontextmanager
    async def running(self, clock: Clock | None = None) -> AsyncIterator["Supervisor"]:
        """Supervise until the block ends."""
        self.clock = clock
        port, runner = await self.proxy.listen(self._now)
        kubeconfig = self._kubeconfig(port)
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(self._supervise(kubeconfig))
                try:
                    yield self
                finally:
                    task.cancel()
        finally:
            if self.candidate is not None:
                self.candidate.send(signal.SIGKILL)
            await runner.cleanup()

    def said(self) -> str:
        """What the processes logged; a file of a sweep that was stopped may hold more."""
        with self.log.open() as opened:
            opened.seek(self._log_begins)
            return opened.read()

    def _now(self) -> Candidate:
        assert self.candidate is not None
        return self.candidate

    async def _supervise(self, kubeconfig: str) -> None:
        while True:
            argv = [
                "run", f"--kubeconfig={kubeconfig}", f"--namespace={NAMESPACE}",
                f"--lease-name={self.namespaces[0]}",
                f"--identity={self.name}", f"--watch-namespaces={','.join(self.namespaces)}",
                "--probe-port=0", "--metrics-port=0",
                f"--lease-seconds={self.lease_seconds}", "--log-format=text",
                "--worker-cpu-image=worker:1", "--worker-image=worker:1",
            ]  # fmt: skip
            jump = None if self.clock is None else self.clock.jump
            candidate = self.candidate = Candidate(f"{self.name}#{len(self.exits)}", jump)
            clock = None if self.clock is None else self.clock.file
            candidate.pid, end = await self.launcher.start(argv, self.log, clock)
            status = await asyncio.shield(end)
            candidate.pid = 0
            self.exits.append(status)
            await asyncio.sleep(0.5)

    def _kubeconfig(self, port: int) -> str:
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {"token": self.api.tokens[self.user]}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        file = self.api.folder / f"{self.name}.kubeconfig"
        file.write_text(json.dumps(document))
        return str(file)


def build_clock_shim(folder: Path) -> Path:
    """Compile clock_shim.c into ``folder``."""
    shim = folder / "clock_shim.so"
    source = ROOT / "tests" / "faults" / "clock_shim.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O2", "-o", str(shim), str(source), "-ldl"], check=True
    )
    return shim
