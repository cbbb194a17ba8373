"""Which cluster a command is for: the kit's own, one made by kind, or the user's."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kit.errors import KitError, MissingTool
from kit.layout import Layout
from kit.lifecycle import find_init
from kit.processes import run
from kit.progress import Progress
from kit.settings import REGISTRY

KIND_NAME = "tilefleet"
Kind = Literal["kit", "kind", "external"]


@dataclass(frozen=True)
class Target:
    """The chosen cluster. kubeconfig: the file that reaches it."""

    kind: Kind
    kubeconfig: Path


def choose(environment: Mapping[str, str], external: bool, layout: Layout) -> Target:
    """The target that --external, CLUSTER and KUBECONFIG name; the kit's own if none does.

    Raises KitError for an unknown CLUSTER, or for --external without KUBECONFIG.
    """
    kubeconfig = environment.get("KUBECONFIG", "")
    # `env` exports the kit's own kubeconfig; that does not make the kit an external cluster.
    foreign = bool(kubeconfig) and Path(kubeconfig) != layout.kubeconfig
    name = environment.get("CLUSTER") or ("external" if external or foreign else "kit")
    if name == "kind":
        return Target("kind", layout.cache / "kind.kubeconfig")
    if name == "kit" and not external:
        return Target("kit", layout.kubeconfig)
    if name == "external" or external:
        if not foreign:
            raise KitError(
                "an external cluster needs KUBECONFIG: export the path of its kubeconfig"
            )
        return Target("external", Path(kubeconfig))
    raise KitError(f"CLUSTER={name} is none of kit, kind, external: unset it or choose one of them")


def up_kind(target: Target, progress: Progress) -> None:
    """Create the kind cluster unless there is one."""
    kind = _require("kind", "https://kind.sigs.k8s.io")
    if KIND_NAME in run([kind, "get", "clusters"]).split():
        progress.say(f"the kind cluster {KIND_NAME} already runs")
    else:
        progress.say(f"creating the kind cluster {KIND_NAME}")
        run([kind, "create", "cluster", "--name", KIND_NAME, "--wait", "180s"])
    target.kubeconfig.parent.mkdir(parents=True, exist_ok=True)
    target.kubeconfig.touch(mode=0o600)
    target.kubeconfig.write_text(run([kind, "get", "kubeconfig", "--name", KIND_NAME]))


def down_kind(target: Target) -> None:
    """Delete the kind cluster and its kubeconfig."""
    run([_require("kind", "https://kind.sigs.k8s.io"), "delete", "cluster", "--name", KIND_NAME])
    target.kubeconfig.unlink(missing_ok=True)


def require_reachable(target: Target) -> None:
    """Raises KitError unless the cluster's API server answers within ten seconds."""
    kubectl = _require("kubectl", "https://kubernetes.io/docs/tasks/tools")
    path = f"--kubeconfig={target.kubeconfig}"
    run([kubectl, path, "get", "--raw", "/readyz", "--request-timeout=10s"])


def exports(target: Target, layout: Layout) -> dict[str, str]:
    """Environment for programs that use the cluster. Raises KitError if the kit is down."""
    values = {"KUBECONFIG": str(target.kubeconfig), "TILEFLEET_CLUSTER": target.kind}
    if target.kind == "kit":
        values["TILEFLEET_INIT_PID"] = str(require_init(layout))
        values["REGISTRY"] = REGISTRY
        values["AUDIT_LOG"] = str(layout.audit_log)
        values["NO_PROXY"] = "10.0.0.0/8,localhost,127.0.0.1,.svc,.cluster.local"
        values["no_proxy"] = values["NO_PROXY"]
        values["PATH"] = f"{layout.path}:{os.environ.get('PATH', os.defpath)}"
        # Discovery and chart caches die with the cluster instead of staying in the home folder.
        values["KUBECACHEDIR"] = str(layout.run / "kubectl-cache")
        for name in ("CACHE", "CONFIG", "DATA"):
            values[f"HELM_{name}_HOME"] = str(layout.run / "helm" / name.lower())
    return values


def require_init(layout: Layout) -> int:
    """The id of the kit's first process. Raises KitError if the kit is down."""
    init = find_init(layout)
    if init is None or not (layout.run / "ready").exists():
        raise KitError("the cluster is not running: `python3 hack/cluster up` starts it")
    return init


def command_in(target: Target, layout: Layout, command: list[str]) -> list[str]:
    """The command line that runs a command where the cluster's addresses and names work."""
    if target.kind != "kit":
        return command
    # A mount namespace for this command only, so that it resolves names by the cluster's DNS.
    script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    enter = ["nsenter", "-t", str(require_init(layout)), "-n", "unshare", "-m"]
    return [*enter, "sh", "-c", script, str(layout.run / "etc" / "resolv.conf"), *command]


def _require(program: str, source: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise MissingTool(f"{program} is not on PATH: install it from {source}")
    return found
