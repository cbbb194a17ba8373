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
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.faults.proxy import Candidate, FaultProxy
from tests.operator.apiserver import ROOT, ApiServer, free_port

LEASE_SECONDS = 6.0
NAMESPACE = "faults"
"""Where all operators live, each group with a Lease of its own."""
_NUMBERS = itertools.count()


class Launcher:
    """Forks operators from one process that has imported them already; see launcher.py."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.started: asyncio.Queue[int] = asyncio.Queue()
        self.ends: dict[int, asyncio.Future[int]] = {}
        self.lock = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator["Launcher"]:
        """A launcher; its children end with it."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "tests" / "faults" / "launcher.py"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        launcher = cls(process)
        reader = asyncio.create_task(launcher._read())
        reader.add_done_callback(_must_not_fail)
        try:
            yield launcher
        finally:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()
            reader.cancel()

    async def start(self, argv: Sequence[str], log: Path) -> tuple[int, asyncio.Future[int]]:
        """PID, and the future exit status (negative: a signal)."""
        assert self.process.stdin is not None
        async with self.lock:
            command: dict[str, Any] = {"argv": list(argv), "log": str(log)}
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            pid = await self.started.get()
        return pid, self.ends[pid]

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            said = json.loads(line)
            if "pid" in said:
                self.ends[said["pid"]] = asyncio.get_running_loop().create_future()
                self.started.put_nowait(said["pid"])
            else:
                self.ends[said["ended"]].set_result(said["status"])


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
        user: str = "operator-a",
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.lease_seconds = lease_seconds
        self.api, self.proxy, self.launcher = api, proxy, launcher
        self.namespaces, self.user = tuple(namespaces), user
        self.name = f"{self.namespaces[0]}-{user}-{next(_NUMBERS)}"
        self.log = api.folder / f"{self.name}.log"
        self.clock: Clock | None = None
        self.exits: list[int] = []
        self.candidate: Candidate | None = None
        self._pid = 0
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self, clock: Clock | None = None) -> AsyncIterator["Supervisor"]:
        """Supervise until the block ends."""
        self.clock = clock
        port, runner = await self.proxy.listen(self._now)
        kubeconfig = self._kubeconfig(port)
        self._task = asyncio.create_task(self._supervise(kubeconfig))
        self._task.add_done_callback(_must_not_fail)
        try:
            yield self
        finally:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._signal(signal.SIGKILL)
            await runner.cleanup()

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """The present process."""
        return self._pid

    def _now(self) -> Candidate:
        assert self.candidate is not None
        return self.candidate

    async def _supervise(self, kubeconfig: str) -> None:
        while True:
            argv = [
                "run", f"--kubeconfig={kubeconfig}", f"--namespace={NAMESPACE}",
                f"--lease-name={self.namespaces[0]}",
                f"--identity={self.name}", f"--watch-namespaces={','.join(self.namespaces)}",
                f"--probe-port={free_port()}", f"--metrics-port={free_port()}",
                f"--lease-seconds={self.lease_seconds}", "--log-format=text",
                "--worker-cpu-image=worker:1", "--worker-image=worker:1",
            ]  # fmt: skip
            self.candidate = Candidate(
                f"{self.name}#{len(self.exits)}",
                kill=lambda: self._signal(signal.SIGKILL),
                freeze=lambda: self._signal(signal.SIGSTOP),
                set_clock=self._jump,
            )
            if self.clock is None:
                self._pid, end = await self.launcher.start(argv, self.log)
                status = await asyncio.shield(end)
            else:
                status = await self._run_shimmed(argv)
            self._pid = 0
            self.exits.append(status)
            await asyncio.sleep(0.5)

    async def _run_shimmed(self, argv: Sequence[str]) -> int:
        assert self.clock is not None
        environment = {
            **os.environ,
            "LD_PRELOAD": str(self.clock.file.parent / "clock_shim.so"),
            "CLOCK_SHIM_FILE": str(self.clock.file),
        }
        with self.log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tilefleet_operator", *argv,
                stdout=output, stderr=output, env=environment,
            )  # fmt: skip
        self._pid = process.pid
        return await process.wait()

    def _jump(self, seconds: float) -> None:
        assert self.clock is not None
        self.clock.jump(seconds)

    def _signal(self, number: signal.Signals) -> None:
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

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


def _must_not_fail(task: "asyncio.Task[None]") -> None:
    """A supervisor that died must not look like an operator that hangs."""
    if not task.cancelled() and task.exception() is not None:
        task.print_stack()
        os._exit(2)


def build_clock_shim(folder: Path) -> Path:
    """Compile clock_shim.c into ``folder``."""
    shim = folder / "clock_shim.so"
    source = ROOT / "tests" / "faults" / "clock_shim.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O2", "-o", str(shim), str(source), "-ldl"], check=True
    )
    return shim
