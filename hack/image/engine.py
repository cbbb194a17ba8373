"""The container engine: docker, podman or buildah, whichever answers. The only caller of them."""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from inputs import EPOCH, ImageError
from progress import run, say

ENGINES = ("docker", "podman", "buildah")
CERTIFICATES = Path("/etc/ssl/certs")
HOST_CACHE = "/var/cache/uv-host"  # where the build sees this machine's uv cache


def answers(name: str) -> bool:
    """True if the program is there and works; a docker client without its daemon does not."""
    return bool(shutil.which(name)) and not subprocess.run(
        [name, "info"], capture_output=True
    ).returncode  # fmt: skip


def install() -> None:
    """Buildah from Debian's packages. ImageError where that is not possible."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise ImageError("--install needs root and apt-get; install docker, podman or buildah")
    say("no container engine answers: installing buildah")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    options = ["-y", "-qq", "--no-install-recommends"]
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", *options, "buildah"]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ImageError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def choose(wanted: str | None, in_namespace: bool, may_install: bool) -> "Engine":
    """The engine asked for, else the first that answers.

    in_namespace: a push from another network namespace is needed, which docker's daemon cannot do.
    """
    if wanted is None:
        usable = [name for name in ENGINES if not (in_namespace and name == "docker")]
        wanted = next((name for name in usable if answers(name)), None)
        if wanted is None and may_install:
            install()
            wanted = "buildah"
    if wanted is None or not answers(wanted):
        raise ImageError(
            f"no container engine answers ({wanted or ', '.join(ENGINES)} tried). Start docker, "
            "or as root on Debian: apt-get install buildah (build --install does it)"
        )
    return Engine(wanted)


@dataclass(frozen=True)
class Engine:
    """One engine by its program's name; methods are the few things that the image build asks."""

    name: str

    @property
    def environment(self) -> dict[str, str]:
        """Buildah as root in a container or VM without a runtime: chroot isolation, overlayfs."""
        if self.name != "buildah" or os.geteuid() != 0:
            return {}
        return {
            "BUILDAH_ISOLATION": os.environ.get("BUILDAH_ISOLATION", "chroot"),
            "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "overlay"),
        }

    def _quiet(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.name, *arguments], capture_output=True, text=True,
            env={**os.environ, **self.environment},
        )  # fmt: skip

    def store(self) -> Path:
        """Folder that grows with each image; the root folder where the engine does not say."""
        if self.name == "docker":
            found = self._quiet("info", "--format", "{{.DockerRootDir}}").stdout.strip()
        else:
            found = json.loads(self._quiet("info").stdout or "{}").get("store", {}).get(
                "GraphRoot" if self.name == "buildah" else "graphRoot", "")  # fmt: skip
        path = Path(found or "/")
        return path if path.exists() else Path("/")

    def exists(self, reference: str) -> bool:
        """True if the image is in the local store."""
        inspect = ("inspect", "--type", "image") if self.name != "docker" else ("image", "inspect")
        return not self._quiet(*inspect, reference).returncode

    def tag(self, reference: str, other: str) -> None:
        """Give an image a second reference."""
        done = self._quiet("tag", reference, other)
        if done.returncode:
            raise ImageError(f"{self.name} tag {reference} {other}: {done.stderr.strip()}")

    def remove(self, reference: str) -> None:
        """Remove one reference and what only it holds; no error if it is not there."""
        self._quiet("rmi", reference)

    def references(self, start: str) -> list[str]:
        """References in the local store that start so."""
        if self.name == "buildah":
            listed = json.loads(self._quiet("images", "--json").stdout or "null") or []
            names = [name for image in listed for name in image.get("names") or ()]
        else:
            template = "{{.Repository}}:{{.Tag}}"
            names = self._quiet("images", "--format", template).stdout.split()
        return [name for name in names if name.startswith(start)]

    def prune(self) -> None:
        """Remove layers that no named image is built on."""
        self._quiet(*("rmi", "--prune") if self.name == "buildah" else ("image", "prune", "-f"))

    def size_bytes(self, reference: str) -> int | None:
        """Uncompressed size of an image, None where the engine does not tell."""
        if self.name == "buildah":
            listed = self._quiet("images", "--json", reference)
            sizes = [i.get("size") for i in json.loads(listed.stdout or "null") or ()]
            return parsed_size(sizes[0]) if sizes and isinstance(sizes[0], str) else None
        done = self._quiet("image", "inspect", "--format", "{{.Size}}", reference)
        return int(done.stdout) if done.stdout.strip().isdigit() else None

    def can_pull(self, reference: str) -> bool:
        """Pull an image unless it is there; False (and why, on one line) if that fails."""
        if self.exists(reference):
            return True
        done = self._quiet("pull", reference)
        if done.returncode:
            say(f"  {reference} cannot be pulled: {(done.stderr.strip() or '?').splitlines()[-1]}")
        return not done.returncode

    def build(
        self,
        context: Path,
        target: str | None,
        reference: str,
        arguments: dict[str, str],
        labels: dict[str, str],
        log: Path,
    ) -> float:
        """Build one target of the context's Dockerfile; seconds it took.

        labels: by the last part of their OCI name, such as version. They come from here and not
        from the Dockerfile, where each would be one more step after the code.
        """
        command = [self.name, "bud" if self.name == "buildah" else "build"]
        environment = dict(self.environment)
        if self.name == "docker":
            environment |= {"DOCKER_BUILDKIT": "1", "SOURCE_DATE_EPOCH": str(EPOCH)}
            command.append("--progress=plain")
        else:
            command += ["--layers", "--network", "host", "--timestamp", str(EPOCH)]
            if CERTIFICATES.is_dir():
                command += ["-v", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
            if target and (cache := uv_cache()):
                command += ["-v", f"{cache}:{HOST_CACHE}"]
                arguments = {**arguments, "UV_CACHE_DIR": HOST_CACHE}
        command += ["--target", target] if target else []
        for key, value in sorted(arguments.items()):
            command += ["--build-arg", f"{key}={value}"]
        for key, value in sorted(labels.items()):
            command += ["--label", f"org.opencontainers.image.{key}={value}"]
        command += ["-t", reference, "-f", str(context / "Dockerfile"), str(context)]
        before = self._working_containers()
        try:
            return run(target or "base", command, log, environment, is_step)
        except BaseException:  # Ctrl-C too: buildah then leaves gigabytes behind
            for container in self._working_containers() - before:
                self._quiet("rm", container)
            raise

    def _working_containers(self) -> set[str]:
        """Ids of buildah's containers of unfinished builds; the other engines clean up."""
        return set(self._quiet("containers", "-q").stdout.split() if self.name == "buildah" else ())

    def push(
        self, reference: str, remote: str, netns_pid: int | None, plain: bool, log: Path
    ) -> float:
        """Push to remote, from the network namespace of netns_pid if given; seconds it took.

        plain: the registry speaks HTTP or has a certificate that this machine does not know.
        """
        if self.name == "docker":
            if netns_pid is not None:
                raise ImageError(
                    "docker's daemon pushes from its own network: use podman or buildah"
                )
            self.tag(reference, remote)
            command = ["docker", "push", remote]
        else:
            # zstd: a third of gzip's time for the torch layer; containerd reads it since 1.5
            command = [self.name, "push", "--compression-format", "zstd"]
            command += ["--compression-level", "1"] if self.name == "buildah" else []
            command += ["--tls-verify=false"] if plain else []
            command += [reference, f"docker://{remote}"]
        return run("push", in_namespace(netns_pid) + command, log, self.environment, is_copy)


def in_namespace(netns_pid: int | None) -> list[str]:
    """Prefix that runs a command in the network namespace of a process."""
    return [] if netns_pid is None else ["nsenter", "-t", str(netns_pid), "-n"]


def uv_cache() -> Path | None:
    """This machine's uv cache: what the virtual environment downloaded is not downloaded again.

    Only for images of this machine's own architecture and only as root, who can write to it.
    """
    path = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    return path if path.is_dir() and os.geteuid() == 0 and platform.system() == "Linux" else None


def parsed_size(text: str) -> int | None:
    """Bytes of a size such as "3.1 GB", as buildah lists it. Pure."""
    number, _, unit = text.strip().partition(" ")
    scale = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}.get(unit.upper())
    try:
        return int(float(number) * scale) if scale else None
    except ValueError:
        return None


def is_step(line: str) -> bool:
    """Lines of a build's output that a person wants to see. Pure."""
    return (
        line.startswith(("STEP ", "[", "torch ", "PyTorch", "byte code"))
        or (line.startswith("#") and "] " in line[:40])
        or "rror" in line[:20]
    )


def is_copy(line: str) -> bool:
    """Lines of a push's output that a person wants to see. Pure."""
    return line.startswith(("Writing manifest", "latest: digest")) or "rror" in line


if __name__ == "__main__":
    sys.exit("this is a module of: python3 hack/image")
