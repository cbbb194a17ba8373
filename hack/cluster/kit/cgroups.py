"""The cgroup that holds all pods of a cluster, on cgroup v1 and v2."""

import contextlib
import os
import time
from pathlib import Path

from kit.errors import KitError

ROOT = Path("/sys/fs/cgroup")
V1_CONTROLLERS = (
    "cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd",
)  # fmt: skip


def folders(name: str) -> list[Path]:
    """Where a cgroup of this name lies: one folder on v2, one per controller on v1."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT / name]
    # Controllers may be mounted together (cpu,cpuacct); links then name the same folder.
    real = [(ROOT / c).resolve() / name for c in V1_CONTROLLERS if (ROOT / c).is_dir()]
    return list(dict.fromkeys(real))


def create(name: str) -> None:
    """Create the cgroup with every controller that a kubelet asks for."""
    for folder in folders(name):
        folder.mkdir(exist_ok=True)
        if (ROOT / "cgroup.controllers").exists():
            _enable_v2()
        if (folder / "cpuset.cpus").exists() and not (ROOT / "cgroup.controllers").exists():
            for file in ("cpuset.cpus", "cpuset.mems"):  # a v1 child starts with none
                (folder / file).write_text((folder.parent / file).read_text())


def _enable_v2() -> None:
    for controller in (ROOT / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):  # rdma and misc may be held elsewhere; pods need neither
            (ROOT / "cgroup.subtree_control").write_text(f"+{controller}")


def remove(name: str, timeout_seconds: float = 10.0) -> None:
    """Remove the cgroup and all below it, once the kernel has let the last process go.

    Raises KitError naming what is still there after the timeout.
    """
    deadline = time.monotonic() + timeout_seconds
    # On v1 the runtime also makes one in the `unified` hierarchy, which has no controllers.
    while left := [*ROOT.glob(name), *ROOT.glob(f"*/{name}")]:
        for folder in left:
            for path, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(path)
        if time.monotonic() > deadline:
            raise KitError(f"cgroups still in use: {', '.join(map(str, left))}; run `down` again")
        time.sleep(0.05)
