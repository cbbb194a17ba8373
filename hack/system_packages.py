"""Checks the programs that the cluster kit and the image build call; on Debian root installs them.

Runs with the system's Python before any virtual environment exists. A container engine that already
answers (docker, podman or buildah) is taken as it is.
"""

import os
import shutil
import subprocess
import sys

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
    if not go:
        print(
            "missing: go 1.26 or newer, which builds Kubernetes once; or set KUBEBUILDER_ASSETS",
            file=sys.stderr,
        )
    return 1 if wanted else 0


if __name__ == "__main__":
    sys.exit(main())
