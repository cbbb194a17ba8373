"""Addresses and names of the cluster, and its configuration files filled in from config/."""

from pathlib import Path
from string import Template

from kit.layout import Layout

NODE_NAME = "kit-node"
NODE_ADDRESS = "10.99.0.1"
REGISTRY = f"{NODE_ADDRESS}:5000"
SERVER = f"https://{NODE_ADDRESS}:6443"
SERVICE_RANGE = "10.96.0.0/16"
POD_RANGE = "10.244.0.0/16"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
PAUSE_IMAGE = "kit.local/pause:1"
TEMPLATES = Path(__file__).resolve().parent.parent / "config"


def write_all(layout: Layout) -> None:
    """Write every component's configuration under run/etc."""
    targets = {
        "containerd.toml": "containerd.toml",
        "kubelet.yaml": "kubelet.yaml",
        "proxy.yaml": "proxy.yaml",
        "audit-policy.yaml": "audit-policy.yaml",
        "Corefile": "Corefile",
        "registry.yaml": "registry.yaml",
        "resolv.conf": "resolv.conf",
        "cni.conflist": "cni/10-kit.conflist",
        "hosts.toml": f"registries/{REGISTRY}/hosts.toml",
    }
    for template, target in targets.items():
        path = layout.run / "etc" / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fill(template, layout))
    # The same containerd without its CRI part tidies up after a cluster that died.
    tidy = fill("containerd.toml", layout, 'disabled_plugins = ["io.containerd.grpc.v1.cri"]')
    (layout.run / "etc" / "containerd-tidy.toml").write_text(tidy)


def fill(template: str, layout: Layout, disabled_plugins: str = "") -> str:
    """The text of one template with the layout's values. An unknown name raises KeyError."""
    return Template((TEMPLATES / template).read_text()).substitute(
        CGROUP=layout.cgroup,
        CNI_BIN=layout.kit / "cni",
        CONTAINERD_ROOT=layout.cache / "containerd",
        DISABLED_PLUGINS=disabled_plugins,
        NODE_ADDRESS=NODE_ADDRESS,
        NODE_NAME=NODE_NAME,
        PATH_FOLDER=layout.path,
        REGISTRY=REGISTRY,
        REGISTRY_ROOT=layout.cache / "registry",
        RUN=layout.run,
    )
