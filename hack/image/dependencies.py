"""Runs inside the image build: installs one lock file with uv, every hash checked, and compiles it.

Usage: dependencies.py LOCK. uv itself is pinned by uv.txt and lives in a cache mount, so no layer
holds it; a second virtual environment there is all that pip is needed for.
"""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import bytecode

HERE = Path(__file__).parent
TOOLS = Path("/opt/uv")  # a cache mount
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def uv_program() -> str:
    """Path of the pinned uv, installed into the cache mount if it is not there yet."""
    lock = HERE / "uv.txt"
    home = TOOLS / hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    program = home / "bin" / "uv"
    if not program.exists():
        subprocess.run(["python3", "-m", "venv", "--clear", str(home)], check=True)
        trust = {"PIP_CERT": str(CERTIFICATES)} if CERTIFICATES.exists() else {}
        subprocess.run(
            [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-cache-dir",
             "--disable-pip-version-check", "--require-hashes", "-r", str(lock)],
            check=True, env={**os.environ, **trust},
        )  # fmt: skip
    return str(program)


def install(*arguments: str, **environment: str) -> bool:
    """True if uv installed it into this environment; what uv says goes to the build's output."""
    command = [
        uv_program(), "pip", "install", "--system-certs", "--python", sys.executable,
        "--link-mode", "copy", *arguments,
    ]  # fmt: skip
    return not subprocess.run(command, env={**os.environ, **environment}).returncode


def site_packages() -> Path:
    """Where this environment's packages are."""
    return Path(sysconfig.get_path("purelib"))


def main(lock: str) -> int:
    """0 if all is installed and compiled."""
    if not install("--require-hashes", "-r", lock):
        return 1
    return bytecode.main([str(site_packages())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
