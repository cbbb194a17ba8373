"""Starts the cluster and the images for a Testbed, and takes away what it started.

The local cluster by default; with KUBECONFIG=FILE that cluster, with CLUSTER=kind one made by kind.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from testbed import NAMESPACE, RELEASE, ROOT, Testbed, TestbedError

Stage = Callable[[str, str], AbstractContextManager[None]]
TARGETS = {"operator": "operator", "worker-cpu": "workerCpu"}
"""Image targets that are built -> keys of the chart's values."""
STOP_SECONDS = 90
DEFINITION = "inferencedeployments.tilefleet.io"


@contextlib.contextmanager
def quiet(name: str, why: str) -> Iterator[None]:
    """A stage that nobody watches."""
    yield


@contextlib.contextmanager
def started(keep: bool = False, stage: Stage = quiet) -> Iterator[Testbed]:
    """A Testbed with images, chart not installed; at the end everything it started is gone.

    keep: leave all of it. A cluster that ran before is left, without the release and its fleets.
    Raises TestbedError.
    """
    bed: Testbed | None = None
    command = ["python3", "hack/cluster", "status"]
    ran_before = subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    try:
        with stage("cluster", "etcd, API server, kubelet, containerd, DNS, registry"):
            tool("hack/cluster", "up")
            found = connected()
            require_free(found)
            bed = found
        with stage("images", "operator and worker-cpu, built and pushed where the nodes pull"):
            bed = with_images(bed)
        yield bed
    finally:
        if not keep:
            with stage("tear down", "nothing may stay"), uninterrupted():
                if bed is not None and (ran_before or not bed.is_local):
                    remove_release(bed)
                if not ran_before:
                    tool("hack/cluster", "down")


def tool(folder: str, *arguments: str, check: bool = True) -> tuple[int, list[str]]:
    """Exit status and lines of one of the repository's tools; they go to the terminal as they come.

    After Ctrl-C it waits until the tool has cleaned up. Raises TestbedError.
    """
    command = ["python3", "-u", folder, *arguments]
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip("\n"))
                print(line, end="", file=sys.stderr, flush=True)
            status = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=STOP_SECONDS)
            raise
    if check and status != 0:
        raise TestbedError(f"{' '.join(command)}: exit status {status}; its last lines say why")
    return status, lines


def output(*arguments: str) -> str:
    """Standard output of one of the repository's tools. Raises TestbedError."""
    done = subprocess.run(["python3", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise TestbedError(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def connected() -> Testbed:
    """The Testbed of the cluster that hack/cluster names, without images."""
    lines = output("hack/cluster", "env").splitlines()
    exports = dict(shlex.split(line)[1].split("=", 1) for line in lines)
    if "TILEFLEET_INIT_PID" not in exports:
        return Testbed(environment={**os.environ, **exports})
    # Inside the cluster's network no proxy can be reached.
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return Testbed(
        environment={**kept, **exports},
        enter=("nsenter", "-t", exports["TILEFLEET_INIT_PID"], "-n"),
        enter_names=("python3", "hack/cluster", "exec", "--"),
        audit_log=Path(exports["AUDIT_LOG"]),
    )


def with_images(bed: Testbed) -> Testbed:
    """The same Testbed once its nodes can get the images of the present sources."""
    build = ["build", *(part for target in TARGETS for part in ("--target", target))]
    registry = bed.environment.get("REGISTRY", "")
    if bed.is_local:
        inside = bed.environment["TILEFLEET_INIT_PID"]
        _, lines = tool("hack/image", *build, "--push", registry, "--netns-pid", inside)
    elif bed.environment.get("TILEFLEET_CLUSTER") == "kind":
        registry = "localhost"
        _, lines = tool("hack/image", *build)
        images = built(lines, registry).values()
        bed.run("kind", "load", "docker-image", "--name", RELEASE, *images, seconds=900)
    else:
        named = os.environ.get("IMAGE_REGISTRY", "")
        if not named:
            raise TestbedError(
                "IMAGE_REGISTRY is not set: name the registry (host[:port], or http://host:port "
                "without TLS) that the nodes of KUBECONFIG's cluster pull from and that this "
                "machine may push to"
            )
        registry = named.removeprefix("http://")
        tls = [] if named.startswith("http://") else ["--tls"]
        _, lines = tool("hack/image", *build, "--push", registry, *tls)
    return Testbed(**{**vars(bed), "chart_values": chart_values(built(lines, registry))})


def built(lines: list[str], registry: str) -> dict[str, str]:
    """Image target -> reference that a build named last; sources may have changed since."""
    found: dict[str, str] = {}
    for target in TARGETS:
        pattern = re.compile(re.escape(f"{registry}/tilefleet/{target}:") + r"[0-9a-f]+")
        matches = [match.group() for line in lines for match in pattern.finditer(line)]
        if not matches:
            raise TestbedError(f"the build named no image {registry}/tilefleet/{target}")
        found[target] = matches[-1]
    return found


def chart_values(references: dict[str, str]) -> tuple[str, ...]:
    """Helm arguments that name the images."""
    arguments: list[str] = []
    for target, reference in references.items():
        registry, _, path = reference.partition("/")
        repository, _, tag = path.rpartition(":")
        for key, value in (("registry", registry), ("repository", repository), ("tag", tag)):
            arguments += ["--set-string", f"image.{TARGETS[target]}.{key}={value}"]
    return tuple(arguments)


def require_free(bed: Testbed) -> None:
    """Raises TestbedError on a cluster of the user's that holds tilefleet: that is not ours."""
    if not bed.is_local and bed.get("crd", DEFINITION) is not None:
        raise TestbedError(
            f"the cluster of {bed.environment['KUBECONFIG']} already has {DEFINITION}: this would "
            "take over its release and delete its fleets; name another cluster, or remove it first"
        )


def remove_release(bed: Testbed) -> None:
    """Fleets, release, its definition and its namespace, on a cluster that goes on."""
    if bed.is_local:
        bed.remove_fake_nodes()
    for arguments in (
        ("kubectl", "delete", "infd", "--all", "-A", "--wait=true", "--timeout=90s"),
        ("helm", "uninstall", RELEASE, "-n", NAMESPACE, "--wait", "--ignore-not-found"),
        ("kubectl", "delete", "crd", DEFINITION, "--ignore-not-found"),
        ("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found"),
    ):
        done = bed.run(*arguments, check=False, seconds=180)
        if done.returncode != 0:
            print(f"{' '.join(arguments)}: {done.stderr.strip()}", flush=True)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not stop the cleaning up."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
