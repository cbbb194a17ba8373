"""The base image where no public registry can be reached: Debian, from the machine's own mirror."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from engine import Engine
from inputs import EPOCH, ImageError
from progress import run, say

DEFAULT = "python:3.12-slim"
PACKAGES = "python3,python3-venv,ca-certificates"
# Not needed at run time, and the mirror's address (sources.list) is nobody's business.
LEFT_OUT = (
    "./proc/*", "./sys/*", "./dev/*", "./run/*", "./tmp/*", "./debootstrap", "./var/cache/*",
    "./var/lib/apt/lists/*", "./var/log/*", "./usr/share/doc/*", "./usr/share/man/*",
    "./usr/share/locale/*", "./etc/apt/sources.list", "./etc/apt/sources.list.d/*",
    "./etc/resolv.conf", "./etc/hostname", "./etc/machine-id",
)  # fmt: skip
SUITES = ("bookworm", "trixie")  # Debian releases whose Python is 3.11 or newer


def cache() -> Path:
    """Folder of root file systems and logs; survives between builds."""
    home = os.environ.get("TILEFLEET_CACHE") or Path.home() / ".cache" / "tilefleet"
    folder = Path(home) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def suite() -> str:
    """Debian release of this machine. ImageError if it is none that can be a base."""
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    name = re.search(r"^VERSION_CODENAME=(\w+)", release, re.M)
    if not name or name[1] not in SUITES:
        raise ImageError(
            f"{DEFAULT} cannot be pulled, and a Debian base is made only on {' or '.join(SUITES)}: "
            "make a registry reachable, or give a base that is here with --base"
        )
    return name[1]


def mirror(sources: str) -> str | None:
    """The first Debian archive named in apt sources of either format; not security. Pure."""
    for line in sources.splitlines():
        found = re.match(r"(?:deb\s+(?:\[[^]]*\]\s+)?|URIs:\s*)(\S+)", line)
        if found and re.search(r"/debian/?$", found[1]):
            return found[1]
    return None


def apt_sources() -> str:
    """Text of all apt sources of this machine."""
    folder = Path("/etc/apt")
    lists = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    return "\n".join(
        p.read_text() for p in lists if p.is_file() and p.suffix in (".list", ".sources")
    )


def root_archive(name: str, folder: Path) -> Path:
    """Tar archive of a minimal Debian with Python, made once and cached in folder."""
    archive = folder / f"debian-{name}.tar"
    if archive.exists():
        return archive
    if not shutil.which("debootstrap") or os.geteuid() != 0:
        raise ImageError("a Debian base needs root and debootstrap: apt-get install debootstrap")
    source = mirror(apt_sources())
    if source is None:
        raise ImageError("/etc/apt names no Debian mirror, so no Debian base can be made")
    say(f"  making a Debian {name} base (once, 1 to 2 minutes)")
    with TemporaryDirectory(dir=folder) as work:
        # A mount namespace of its own: debootstrap's /proc goes with it, also after Ctrl-C.
        command = ["unshare", "-m", "debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
        command += [name, work + "/root", source]
        run("base", command, folder / "debootstrap.log", {}, is_phase)
        pack(Path(work) / "root", archive)
    return archive


def pack(root: Path, archive: Path) -> None:
    """Reproducible tar of a root file system; written beside its final name, then renamed."""
    part = archive.with_suffix(".part")
    command = ["tar", "--sort=name", f"--mtime=@{EPOCH}", "--numeric-owner", "--anchored"]
    command += [f"--exclude={pattern}" for pattern in LEFT_OUT]
    done = subprocess.run([*command, "-C", str(root), "-cf", str(part), "."],
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise ImageError(f"tar of the Debian base failed: {done.stderr.strip()[-500:]}")
    part.rename(archive)


def is_phase(line: str) -> bool:
    """Lines of debootstrap's output that a person wants to see. Pure."""
    return line.startswith(("I: Base", "I: Installing", "I: Unpacking the", "E:"))


@functools.cache  # the answer is the same for all targets of one run
def resolve(engine: Engine, wanted: str | None) -> str:
    """Reference of the base: the one asked for, the default, or Debian as a fallback."""
    if wanted:
        return wanted
    if engine.can_pull(DEFAULT):
        return DEFAULT
    name = suite()
    reference = f"localhost/tilefleet/debian:{name}"
    say(f"  falling back to a Debian {name} base")
    if not engine.exists(reference):
        archive = root_archive(name, cache())
        with TemporaryDirectory(dir=cache()) as context:
            os.link(archive, Path(context) / "root.tar")
            (Path(context) / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
            engine.build(Path(context), None, reference, {}, {}, cache() / "base.log")
    return reference
