"""The first process of the cluster's namespaces: sets them up, starts everything, watches it.

When it ends, the kernel ends every process, mount and interface of the cluster. It writes
run/ready (JSON: seconds by step) once all answers, or run/dead with the reason before it ends.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kit import components, health, settings
from kit.errors import KitError, StartFailed
from kit.layout import Layout
from kit.processes import run

PRIVATE_FOLDERS = {
    "/var/lib/kubelet": "kubelet",
    "/var/lib/cni": "cni-results",
    "/var/log/containers": "log-links",
}
"""Path → folder under run that takes its place: paths fixed in the components'
code, of which the cluster gets its own."""


class Init:
    """Owns the components' processes. It does not know how it was brought into namespaces."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._names: dict[int, str] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    def start_all(self) -> None:
        """Start the components in their order and return when every part answers.

        Raises StartFailed if one ends first.
        """
        layout = self._layout
        self._start(components.etcd(layout))
        self._start(components.api_server(layout))
        self._start(components.registry(layout))
        self._tidy_containerd()
        self._start(components.containerd(layout))
        self._wait(lambda: health.api_ready(layout.run))
        self._done("API server")
        for command in (
            components.controller_manager(layout),
            components.scheduler(layout),
            components.kubelet(layout),
            components.kube_proxy(layout),
            components.coredns(layout),
            components.kwok(layout),
        ):
            self._start(command)
        self._wait(lambda: not health.problems(layout.run))
        self._done("all ready")
        partial = layout.run / ".ready"
        partial.write_text(json.dumps(self._seconds))
        partial.rename(layout.run / "ready")

    def supervise(self) -> None:
        """Reap children until a component ends, which raises StartFailed."""
        while True:
            self._note_end(*os.waitpid(-1, 0))

    def _start(self, command: list[str]) -> None:
        name = command[0]
        with (self._layout.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._names[process.pid] = name
        self._processes.append(process)

    def _note_end(self, pid: int, status: int) -> None:
        # As the first process we also inherit orphans, such as container shims; those are no loss.
        if pid in self._names:
            code = os.waitstatus_to_exitcode(status)
            raise StartFailed(f"{self._names[pid]} ended with {code}")

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not ready():
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    self._note_end(*ended)
            time.sleep(0.1)

    def _done(self, step: str) -> None:
        self._seconds[step] = round(time.monotonic() - self._began, 2)

    def _tidy_containerd(self) -> None:
        """Remove what containers of a dead cluster left in the kept image store."""
        root = self._layout.cache / "containerd"
        for folder in ("io.containerd.runtime.v2.task", "io.containerd.grpc.v1.cri"):
            shutil.rmtree(root / folder, ignore_errors=True)
        with (self._layout.logs / "containerd-tidy.log").open("ab") as log:
            process = subprocess.Popen(
                components.containerd(self._layout, "containerd-tidy.toml"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        ctr = ["ctr", "-a", settings.CONTAINERD_SOCKET, "-n", "k8s.io"]
        _wait_for_answer([*ctr, "version"], process)
        stale = run([*ctr, "containers", "ls", "-q"]).split()
        if stale:
            run([*ctr, "containers", "rm", *stale])
        run([*ctr, "images", "import", str(self._layout.run / "pause.tar")])
        process.terminate()
        process.wait()
        self._done("image store")


def _wait_for_answer(command: list[str], process: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            run(command)
            return
        except KitError as error:
            if process.poll() is not None:
                raise StartFailed(f"containerd ended with {process.returncode}") from error
            time.sleep(0.05)


def _set_up_mounts(layout: Layout) -> None:
    run(["mount", "-t", "tmpfs", "tmpfs", "/run"])
    Path("/run/containerd").mkdir()
    for target, source in PRIVATE_FOLDERS.items():
        (layout.run / source).mkdir(exist_ok=True)
        run(["mount", "--bind", layout.run / source, target])
    # Volumes that the kubelet mounts must reach the containers.
    run(["mount", "--make-rshared", "/"])


def _set_up_network() -> None:
    """A bridge carries the node's address: not every kernel has the dummy device."""
    run(["ip", "link", "set", "lo", "up"])
    run(["ip", "link", "add", "kit0", "type", "bridge"])
    run(["ip", "address", "add", f"{settings.NODE_ADDRESS}/24", "dev", "kit0"])
    run(["ip", "link", "set", "kit0", "up"])
    run(["ip", "route", "add", "default", "dev", "kit0"])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def main(layout: Layout) -> int:
    """Run the cluster until a part of it ends; the caller made the namespaces."""
    lock = (layout.cache / "cluster.lock").open("a+")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartFailed(
                f"another cluster already uses {layout.cache}: end it with its own TILEFLEET_RUN, "
                "or set TILEFLEET_CACHE to another folder"
            ) from None
        _set_up_mounts(layout)
        _set_up_network()
        init = Init(layout)
        init.start_all()
        init.supervise()
    except (KitError, OSError) as error:
        (layout.run / "dead").write_text(f"{error}\n")
        print(error, file=sys.stderr, flush=True)
    return 1
