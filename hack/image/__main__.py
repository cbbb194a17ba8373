"""Builds, pushes and names the project's container images: python3 hack/image build|refs|clean.

Standard library only: it runs before any virtual environment exists. docs/images.md tells more.
"""

import argparse
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import base
import inputs
import registry
from engine import ENGINES, Engine, choose
from inputs import DEFAULT_TARGETS, ROOT, TARGETS, ImageError, reference
from progress import say

# Free space that a build from nothing needs in the engine's store, GB: measured plus a third.
NEEDED_GB = {"operator": 2, "worker-cpu": 10, "worker": 60}


def identity(options: argparse.Namespace, target: str) -> dict[str, str]:
    """Choices of the caller that are part of an image's content, by name. Pure."""
    if target == "worker":
        return {"ROCM_BASE": options.rocm_base}
    return {"BASE": options.base or base.DEFAULT}


def revision() -> str:
    """Commit that the sources come from, with a mark if they differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def check_space(engine: Engine, target: str) -> None:
    """ImageError, with both numbers, if the store's disk is too small for a build from nothing."""
    store = engine.store()
    free, needed = shutil.disk_usage(store).free / 1e9, NEEDED_GB[target]
    if free < needed:
        raise ImageError(
            f"image {target} needs up to {needed} GB below {store}, {free:.1f} GB are free: "
            "free some, or remove old images with python3 hack/image clean"
        )


def build(engine: Engine, options: argparse.Namespace, target: str) -> str:
    """Local reference of the target's image, built unless an image of the same content is there."""
    chosen = identity(options, target)
    local = reference(target, inputs.tag(target, chosen))
    if engine.exists(local):
        say(f"{target}: {local} is up to date")
        return local
    check_space(engine, target)
    arguments = dict(chosen)
    if target != "worker":
        arguments["BASE"] = base.resolve(engine, options.base)
    with TemporaryDirectory(prefix="tilefleet-image-") as folder:
        context = Path(folder)
        inputs.stage(target, context)
        local = reference(target, inputs.tag(target, chosen, context))
        labels = {"version": inputs.version(), "revision": revision()}
        say(f"{target}: building with {engine.name}")
        seconds = engine.build(
            context, target, local, arguments, labels, base.cache() / f"{target}.log"
        )
    engine.tag(local, reference(target, "dev"))
    for old in engine.references(reference(target, "")):
        if old not in (local, reference(target, "dev")):
            engine.remove(old)
    size = engine.size_bytes(local)
    say(f"{target}: {local} built in {seconds:.1f} s" + (f", {size / 1e9:.2f} GB" if size else ""))
    return local


def push(engine: Engine, options: argparse.Namespace, target: str, local: str) -> None:
    """Push under the content's tag and dev, unless the registry holds the content's tag."""
    tag = local.rpartition(":")[2]
    remote = reference(target, tag, options.push)
    if registry.holds(remote, options.netns_pid, options.plain_http):
        say(f"{target}: the registry has {remote}")
        return
    seconds = 0.0
    for name in (tag, "dev"):
        seconds += engine.push(
            local, reference(target, name, options.push), options.netns_pid, options.plain_http,
            base.cache() / f"push-{target}.log",
        )  # fmt: skip
    say(f"{target}: pushed {remote} in {seconds:.1f} s")


@contextmanager
def alone() -> Iterator[None]:
    """One build at a time on a machine: a second would do the same work, and remove old tags."""
    with (base.cache() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another image build on this machine")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def command_build(options: argparse.Namespace) -> None:
    """Build the targets, push them if asked."""
    start = time.monotonic()
    engine = choose(options.engine, options.netns_pid is not None, options.install)
    with alone():
        for target in options.target or DEFAULT_TARGETS:
            local = build(engine, options, target)
            if options.push:
                push(engine, options, target, local)
    say(f"images ready in {time.monotonic() - start:.1f} s")


def command_refs(options: argparse.Namespace) -> None:
    """Print the exact references, as JSON, that a build of the current sources has."""
    found = {
        target: reference(target, inputs.tag(target, identity(options, target)), options.registry)
        for target in options.target or DEFAULT_TARGETS
    }
    print(json.dumps(found, indent=1))


def command_clean(options: argparse.Namespace) -> None:
    """Remove the project's images from the store and the cached base."""
    engine = choose(options.engine, False, False)
    ours = engine.references("localhost/tilefleet/")
    for name in ours:
        engine.remove(name)
    engine.prune()
    shutil.rmtree(base.cache())
    say(f"removed {len(ours)} image references and the cached base")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="hack/image", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--target", action="append", choices=tuple(TARGETS), help="repeatable")
    shared.add_argument("--base", help=f"base image instead of {base.DEFAULT}")
    shared.add_argument("--rocm-base", default="rocm/pytorch:latest", help="base of target worker")
    one = commands.add_parser("build", parents=[shared], help="build, push with --push")
    one.add_argument("--push", metavar="REGISTRY", help="host[:port] to push to")
    one.add_argument("--netns-pid", type=int, help="push from this process's network namespace")
    one.add_argument("--tls", dest="plain_http", action="store_false", help="the registry has TLS")
    one.add_argument("--install", action="store_true", help="as root on Debian, install buildah")
    one.set_defaults(run=command_build)
    two = commands.add_parser("refs", parents=[shared], help="print the references as JSON")
    two.add_argument("--registry", default="localhost")
    two.set_defaults(run=command_refs)
    three = commands.add_parser("clean", help="remove images and the cached base")
    three.set_defaults(run=command_clean)
    for command in (one, three):
        command.add_argument("--engine", choices=ENGINES, help="instead of the first that answers")
    return parser


def main() -> int:
    """0 if done; 1 with one message if a person must change something."""
    options = arguments().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        options.run(options)
    except ImageError as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("image: stopped; finished layers stay for the next build", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
