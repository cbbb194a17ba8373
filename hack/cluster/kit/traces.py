"""What a cluster changes outside its namespaces, written down so that it can be undone."""

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from kit import cgroups
from kit.errors import KitError
from kit.init import PRIVATE_FOLDERS
from kit.layout import Layout

KERNEL_SETTINGS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""Files under /proc/sys that a kubelet sets for the whole machine."""


@dataclass(frozen=True)
class Traces:
    """Values to restore and folders to remove when the cluster is gone."""

    cgroup: str
    created_folders: list[str]
    kernel_settings: dict[str, str]


def leave(layout: Layout) -> None:
    """Create what must exist outside the namespaces, after writing down how to undo it."""
    created = [path for path in PRIVATE_FOLDERS if not Path(path).exists()]
    settings = {name: Path("/proc/sys", name).read_text().strip() for name in KERNEL_SETTINGS}
    traces = Traces(layout.cgroup, created, settings)
    layout.state.write_text(json.dumps(asdict(traces)))
    for path in created:
        Path(path).mkdir(parents=True)
    cgroups.create(layout.cgroup)


def remove(layout: Layout, heirs: list[Path]) -> None:
    """Undo what `leave` did and remove the run folder; a second call does nothing.

    heirs: run folders of other clusters of the kit that run now. They still need the folders and
    the kernel's settings, so the first of them takes over to undo these.
    Raises KitError where the run folder holds something that is not ours.
    """
    if layout.state.exists():
        traces = Traces(**json.loads(layout.state.read_text()))
        cgroups.remove(traces.cgroup)
        if heirs:
            _hand_over(traces, heirs[0] / "state.json")
        else:
            _restore(traces)
    elif layout.run.exists() and any(layout.run.iterdir()):
        raise KitError(
            f"{layout.run} holds no state.json, so it is not a cluster's run folder: "
            "empty it, or set TILEFLEET_RUN to another folder"
        )
    if layout.run.exists():
        _remove_tree(layout)


def _hand_over(traces: Traces, state: Path) -> None:
    heir = Traces(**json.loads(state.read_text()))
    # Whoever made the folders came first and saw the settings as they had been.
    settings = traces.kernel_settings if traces.created_folders else heir.kernel_settings
    created = sorted({*heir.created_folders, *traces.created_folders})
    partial = state.with_name(".state.json")
    partial.write_text(json.dumps(asdict(Traces(heir.cgroup, created, settings))))
    partial.rename(state)


def _restore(traces: Traces) -> None:
    for name, value in traces.kernel_settings.items():
        file = Path("/proc/sys", name)
        if file.read_text().strip() != value:
            file.write_text(value)
    for path in traces.created_folders:
        with contextlib.suppress(OSError):  # somebody else uses it by now
            Path(path).rmdir()


def _remove_tree(layout: Layout) -> None:
    # state.json goes last: an interrupted removal is then still recognised as ours.
    for entry in layout.run.iterdir():
        if entry == layout.state:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    layout.state.unlink(missing_ok=True)
    layout.run.rmdir()
