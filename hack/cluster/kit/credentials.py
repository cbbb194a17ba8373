"""Certificates, tokens and kubeconfigs of one cluster; all die with the run folder."""

import base64
import json
import secrets
from pathlib import Path

from kit.processes import run
from kit.settings import SERVER

USERS = {
    "admin": ("kit-admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kubelet": ("system:node:kit-node", "system:nodes"),
    "proxy": ("system:kube-proxy", ""),
    "coredns": ("kit-coredns", "system:masters"),
    "kwok": ("kit-kwok", "system:masters"),
}
"""kubeconfig name → user name, groups: one user each, so the audit log tells them apart."""

_NAMES = (
    "IP:127.0.0.1,IP:10.99.0.1,IP:10.96.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,"
    "DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
)

_PKI_STEPS = """\
ecparam -name prime256v1 -genkey -noout -out @ca.key
req -x509 -new -key @ca.key -subj /CN=kit-ca -days 3650 -out @ca.crt
ecparam -name prime256v1 -genkey -noout -out @apiserver.key
req -new -key @apiserver.key -subj /CN=kube-apiserver -out @apiserver.csr
x509 -req -in @apiserver.csr -CA @ca.crt -CAkey @ca.key -CAcreateserial -days 3650 \
-out @apiserver.crt -extfile @extensions
genrsa -out @sa.key 2048
rsa -in @sa.key -pubout -out @sa.pub
"""
"""Arguments of openssl, one call per line; @ stands for the folder."""


def write_all(folder: Path) -> None:
    """Write pki/, tokens.csv and one kubeconfig per user into a folder only root can read."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_pki(folder / "pki")
    authority = (folder / "pki" / "ca.crt").read_bytes()
    rows = []
    for name, (user, groups) in USERS.items():
        token = secrets.token_hex(16)
        rows.append(f'{token},{user},{name},"{groups}"\n')
        path = folder / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(kubeconfig(token, authority))
    tokens = folder / "tokens.csv"
    tokens.touch(mode=0o600)
    tokens.write_text("".join(rows))


def kubeconfig(token: str, authority: bytes) -> str:
    """A kubeconfig as JSON, which is YAML too. Pure."""
    cluster = {
        "server": SERVER,
        "certificate-authority-data": base64.b64encode(authority).decode(),
    }
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "kit",
        "clusters": [{"name": "kit", "cluster": cluster}],
        "users": [{"name": "kit", "user": {"token": token}}],
        "contexts": [{"name": "kit", "context": {"cluster": "kit", "user": "kit"}}],
    }
    return json.dumps(document, indent=1)


def _write_pki(pki: Path) -> None:
    pki.mkdir(exist_ok=True, mode=0o700)
    (pki / "extensions").write_text(f"subjectAltName={_NAMES}\n")
    for line in _PKI_STEPS.splitlines():
        run(
            ["openssl", *(str(pki / part[1:]) if part[0] == "@" else part for part in line.split())]
        )
