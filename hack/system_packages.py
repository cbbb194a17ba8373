"""Checks the programs that the cluster kit and the image build call; on Debian root installs them.

Prometheus, which a test lets scrape a worker, is only unpacked: its package would start a server.
Runs with the system's Python before any virtual environment exists. A container engine that already
answers (docker, podman or buildah) is taken as it is.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# program → Debian package
PROGRAMS = {
    "ip": "iproute2",
    "pgrep": "procps",
    "openssl": "openssl",
    "nft": "nftables",
    "unshare": "util-linux",
    "gcc": "gcc",
    "debootstrap": "debootstrap",
}
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
PROMETHEUS = CACHE / "tilefleet" / "prometheus"
ENGINES = ("docker", "podman", "buildah")


def engine_answers() -> bool:
    """True if a container engine can build here (a docker client without a daemon cannot)."""
    for name in ENGINES:
        if (
            shutil.which(name)
            and not subprocess.run([name, "info"], capture_output=True).returncode
        ):
            return True
    return False


def prometheus() -> str | None:
    """Unpack Debian's Prometheus into the user's cache; why there is none, or None."""
    if PROMETHEUS.exists() or shutil.which("prometheus"):
        return None
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "this is no Debian"
    PROMETHEUS.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PROMETHEUS.parent) as folder:
        for command in (["apt-get", "update", "-qq"], None):
            got = subprocess.run(
                ["apt-get", "download", "-qq", "prometheus"],
                cwd=folder,
                capture_output=True,
                text=True,
            )
            if not got.returncode or command is None:
                break
            subprocess.run(command, capture_output=True)
        found = list(pathlib.Path(folder).glob("prometheus_*.deb"))
        if not found:
            return got.stderr.strip()
        tree = pathlib.Path(folder) / "tree"
        subprocess.run(["dpkg-deb", "-x", found[0], tree], check=True)
        tree.rename(PROMETHEUS)
    return None


def missing() -> list[str]:
    """Debian packages whose program is not on PATH."""
    packages = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if not os.path.exists("/usr/include/stdio.h"):
        packages.append("libc6-dev")
    if not engine_answers():
        packages.append("buildah")
    return packages


def main() -> int:
    """0 when all is there afterwards; otherwise say what is missing and how to get it."""
    wanted = missing()
    go = shutil.which("go")
    if wanted and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing from Debian: {' '.join(wanted)}", flush=True)
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, **quiet,
        )  # fmt: skip
        wanted = missing()
    if wanted:
        print(
            f"missing: {' '.join(wanted)}\nas root: apt-get install {' '.join(wanted)}",
            file=sys.stderr,
        )
    if why := prometheus():
        print(f"no Prometheus, the test with it is skipped: {why}", file=sys.stderr)
    if not go:
        print(
            "missing: go 1.26 or newer, which builds Kubernetes once; or set KUBEBUILDER_ASSETS",
            file=sys.stderr,
        )
    return 1 if wanted else 0


if __name__ == "__main__":
    sys.exit(main())
