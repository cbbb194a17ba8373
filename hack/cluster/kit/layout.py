"""Where the kit keeps things: what is cached between clusters and what dies with one."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from kit.catalog import versions_hash


@dataclass(frozen=True)
class Layout:
    """Folders of the kit. cache outlives clusters; run is removed by `down`."""

    cache: Path
    run: Path
    versions: str

    @property
    def kit(self) -> Path:
        """Binaries, CNI plugins and kwok stages of exactly these versions."""
        return self.cache / self.versions

    @property
    def bin(self) -> Path:
        """Built and unpacked programs."""
        return self.kit / "bin"

    @property
    def path(self) -> Path:
        """Links to the programs in use, wherever they were found; goes onto PATH."""
        return self.run / "bin"

    @property
    def kubeconfig(self) -> Path:
        """The cluster administrator's kubeconfig."""
        return self.run / "admin.kubeconfig"

    @property
    def audit_log(self) -> Path:
        """JSON lines of the API server: every write, and reads by service accounts."""
        return self.run / "audit.log"

    @property
    def logs(self) -> Path:
        """One file per component."""
        return self.run / "log"

    @property
    def state(self) -> Path:
        """What `down` needs to undo a start: see lifecycle.State."""
        return self.run / "state.json"

    @property
    def cgroup(self) -> str:
        """The cgroup that holds all pods; differs between caches, so two kits can coexist."""
        return f"tilefleet-{hashlib.sha256(str(self.cache).encode()).hexdigest()[:6]}"


def from_environment() -> Layout:
    """The layout that TILEFLEET_CACHE and TILEFLEET_RUN name, else under ~/.cache/tilefleet."""
    default = Path.home() / ".cache" / "tilefleet"
    cache = Path(os.environ.get("TILEFLEET_CACHE", default)).absolute()
    run = Path(os.environ.get("TILEFLEET_RUN", cache / "run")).absolute()
    return Layout(cache, run, versions_hash())
