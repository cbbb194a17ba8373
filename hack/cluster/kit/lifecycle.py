"""Starts the cluster, finds it again, ends it; the only file that creates namespaces."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit import binaries, credentials, image, settings, traces
from kit.errors import KitError, MissingTool, StartFailed
from kit.layout import Layout
from kit.processes import kill_and_wait, start_ticks
from kit.progress import Progress

COMMAND_FOLDER = Path(__file__).resolve().parent.parent
INIT_COMMAND = "_init"
READY_TIMEOUT_SECONDS = 120.0
TOOLS = {
    "ip": "iproute2",
    "nft": "nftables",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "openssl": "openssl",
}


def up(layout: Layout, progress: Progress) -> None:
    """Start the cluster unless it runs; afterwards every part answers.

    Leaves nothing behind when it fails or is interrupted. Raises KitError.
    """
    require_machine()
    with _lifecycle_lock(layout, progress):
        if is_healthy(layout, progress):
            progress.say("the cluster already runs and is healthy")
            return
        _end(layout, progress)
    programs = binaries.ensure(layout, progress)
    with _lifecycle_lock(layout, progress):
        if find_init(layout) is not None:
            progress.say("another `up` started the cluster meanwhile")
            return
        _start_or_clean(layout, programs, progress)


def down(layout: Layout, progress: Progress) -> None:
    """End the cluster and remove every trace of it; the cache stays."""
    require_machine()
    with _lifecycle_lock(layout, progress):
        _end(layout, progress)


def is_healthy(layout: Layout, progress: Progress) -> bool:
    """Whether the cluster runs and every part of it answers; says what does not."""
    init = find_init(layout)
    if init is None:
        return False
    command = [sys.executable, str(COMMAND_FOLDER), "_health", str(layout.run)]
    result = subprocess.run(
        ["nsenter", "-t", str(init), "-n", *command], capture_output=True, text=True
    )
    if result.returncode != 0:
        progress.say(f"the cluster runs but: {result.stdout.strip() or result.stderr.strip()}")
    return result.returncode == 0


def find_init(layout: Layout) -> int | None:
    """The id of the cluster's first process; None if none runs."""
    return next((pid for pid, name in _kit_processes(layout) if name != "unshare"), None)


def _kit_processes(layout: Layout) -> list[tuple[int, str]]:
    """Ids and names of the cluster's first process and of the unshare that made its namespaces."""
    return [(pid, name) for pid, name, run in _all_kit_processes() if run == layout.run]


def _other_run_folders() -> list[Path]:
    """Run folders of all clusters of the kit on this machine that were not ended."""
    runs = {run for _, _, run in _all_kit_processes() if (run / "state.json").exists()}
    return sorted(runs)


def _all_kit_processes() -> list[tuple[int, str, Path]]:
    """Id, program name and run folder of each.

    Found by their command line, which names the run folder: a recorded id could be reused.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                arguments = (entry / "cmdline").read_text(errors="replace").split("\0")[:-1]
                if arguments[-2:-1] == [INIT_COMMAND]:
                    name = os.path.basename(arguments[0])
                    found.append((int(entry.name), name, Path(arguments[-1])))
    return found


def require_machine() -> None:
    """Raises MissingTool unless this is Linux, as root, with the tools the kit calls."""
    if not sys.platform.startswith("linux"):
        raise MissingTool(
            f"the cluster kit runs on Linux, this is {sys.platform}: use CLUSTER=kind"
        )
    if os.geteuid() != 0:
        raise MissingTool(
            "the cluster kit makes namespaces and must run as root: use sudo, or kind"
        )
    missing = {tool: package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise MissingTool(f"not on PATH: {', '.join(missing)}; apt-get install {packages}")


def _start_or_clean(layout: Layout, programs: dict[str, Path], progress: Progress) -> None:
    try:
        _start(layout, programs)
        _wait_until_ready(layout, progress)
    except BaseException:
        # A second Ctrl-C must not stop the cleaning up.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _keep_logs(layout, progress)
        _end(layout, progress)
        raise


def _start(layout: Layout, programs: dict[str, Path]) -> None:
    layout.run.mkdir(parents=True, exist_ok=True)
    traces.leave(layout)
    layout.logs.mkdir()
    (layout.cache / "containerd").mkdir(exist_ok=True)
    (layout.cache / "registry").mkdir(exist_ok=True)
    binaries.link(programs, layout.path)
    credentials.write_all(layout.run)
    settings.write_all(layout)
    pause = {"/pause": programs["pause"]}
    image.write_archive(layout.run / "pause.tar", settings.PAUSE_IMAGE, ["/pause"], pause)
    command = [sys.executable, str(COMMAND_FOLDER), INIT_COMMAND, str(layout.run)]
    unshare = ["unshare", "-m", "-n", "-p", "-f", "--mount-proc", "--kill-child"]
    with (layout.logs / "init.log").open("wb") as log:
        subprocess.Popen(
            [*unshare, *command],
            env=_environment(layout),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Its own session: a Ctrl-C at the terminal reaches us, and we end it in order.
            start_new_session=True,
        )


def _environment(layout: Layout) -> dict[str, str]:
    # No proxies: the components talk to each other only.
    own = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own["PATH"] = f"{layout.path}:{own.get('PATH', os.defpath)}"
    own["TILEFLEET_CACHE"], own["TILEFLEET_RUN"] = str(layout.cache), str(layout.run)
    return own


def _wait_until_ready(layout: Layout, progress: Progress) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    while not (layout.run / "ready").exists():
        if (layout.run / "dead").exists():
            raise StartFailed((layout.run / "dead").read_text().strip() + _log_ends(layout))
        if time.monotonic() > deadline:
            raise StartFailed(f"not ready within {READY_TIMEOUT_SECONDS:.0f} s{_log_ends(layout)}")
        time.sleep(0.05)
    seconds = json.loads((layout.run / "ready").read_text())
    steps = ", ".join(f"{name} after {value:.1f} s" for name, value in seconds.items())
    progress.say(f"the cluster is ready: {steps}")


def _end(layout: Layout, progress: Progress) -> None:
    init = find_init(layout)
    namespace = None
    if init is not None:
        with contextlib.suppress(OSError):  # it may end by itself just now
            namespace = os.readlink(f"/proc/{init}/ns/net")
    elif layout.state.exists():
        progress.say("a cluster ended without `down`; removing what it left")
    for pid, _ in _kit_processes(layout):
        ticks = start_ticks(pid)
        if ticks is not None:
            kill_and_wait(pid, ticks)
    if namespace and namespace != os.readlink("/proc/self/ns/net"):
        _end_visitors(namespace, progress)
    traces.remove(layout, _other_run_folders())


def _end_visitors(namespace: str, progress: Progress) -> None:
    """End what `exec` started and still runs: it would keep the network namespace alive."""
    own = _ancestors(os.getpid())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in own:
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns" / "net") == namespace:
                    name = (entry / "comm").read_text().strip()
                    ticks = start_ticks(int(entry.name))
                    if ticks is not None:
                        progress.say(f"ending {name} ({entry.name}), which ran in the cluster")
                        kill_and_wait(int(entry.name), ticks)


def _ancestors(pid: int) -> set[int]:
    found = set()
    while pid > 0:
        found.add(pid)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pid = int(fields[1])
    return found


def _keep_logs(layout: Layout, progress: Progress) -> None:
    if layout.logs.exists():
        kept = layout.cache / "last-failed-start"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(layout.logs, kept)
        progress.say(f"logs are kept in {kept}")


def _log_ends(layout: Layout) -> str:
    ends = []
    for log in sorted(layout.logs.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-3:]
        ends.append("\n".join([f"== {log.name}", *lines]))
    return "\n" + "\n".join(ends)


@contextmanager
def _lifecycle_lock(layout: Layout, progress: Progress) -> Iterator[None]:
    layout.cache.mkdir(parents=True, exist_ok=True)
    with (layout.cache / "lifecycle.lock").open("a+") as lock:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began > READY_TIMEOUT_SECONDS + 60:
                    raise KitError(
                        "another `up` or `down` holds the cluster; end it first"
                    ) from None
                if time.monotonic() - began < 0.5:
                    progress.say("another `up` or `down` is at work; waiting for it")
                time.sleep(0.5)
        yield
