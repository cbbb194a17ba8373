"""The command line: python3 hack/cluster COMMAND."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType

from kit import binaries, health, init, karpenter, layout, lifecycle, nodes, target
from kit.errors import KitError
from kit.layout import Layout
from kit.processes import run as run_command
from kit.progress import Progress

EPILOG = """\
CLUSTER=kind uses a kind cluster, KUBECONFIG=path (or --external) a cluster of yours.
TILEFLEET_CACHE (~/.cache/tilefleet) keeps binaries and images, TILEFLEET_RUN (its `run` folder)
holds the running cluster. See docs/cluster.md."""


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="python3 hack/cluster",
        description="A local Kubernetes in namespaces of its own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--external", action="store_true", help="use the cluster KUBECONFIG names")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("up", help="start the cluster; does nothing if it runs")
    commands.add_parser("down", help="end it and remove every trace")
    commands.add_parser("status", help="say whether every part answers; status 0 if so")
    commands.add_parser(
        "env", help="print shell exports: KUBECONFIG, PATH, REGISTRY, AUDIT_LOG ..."
    )
    programs = commands.add_parser("binaries", help="only build and unpack the programs")
    programs.add_argument("--karpenter", action="store_true", help="also Karpenter")
    autoscaler = commands.add_parser(
        "karpenter", help="run Karpenter with its kwok provider in the cluster, until interrupted"
    )
    autoscaler.add_argument("instance_types", type=Path, metavar="INSTANCE_TYPES.json")
    run = commands.add_parser("exec", help="run a command inside: exec -- kubectl get pods -A")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="CMD")
    add = commands.add_parser("add-fake-nodes", help="add nodes with eight fake MI300X each")
    add.add_argument("count", type=_positive, metavar="N")
    add.add_argument("--print", action="store_true", help="print the Node objects instead")
    commands.add_parser("remove-fake-nodes", help="remove them and the pods on them")
    for hidden in (lifecycle.INIT_COMMAND, "_health"):
        commands.add_parser(hidden).add_argument("run", type=Path)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error, 130 after an interrupt."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    progress = Progress()
    try:
        return _dispatch(options, layout.from_environment(), progress)
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.say("interrupted")
        return 130


def _dispatch(options: argparse.Namespace, place: Layout, progress: Progress) -> int:
    if options.command == lifecycle.INIT_COMMAND:
        return init.main(place)
    if options.command == "_health":
        found = health.problems(options.run)
        print("; ".join(found))
        return 1 if found else 0
    if options.command == "binaries":
        for name, program in binaries.ensure(place, progress).items():
            print(f"{name}\t{program}")
        if options.karpenter:
            print(f"{karpenter.BINARY.name}\t{karpenter.ensure(place, progress)}")
        return 0
    chosen = target.choose(os.environ, options.external, place)
    if options.command in ("up", "down", "status"):
        return _life(options.command, chosen, place, progress)
    return _use(options, chosen, place, progress)


def _life(command: str, chosen: target.Target, place: Layout, progress: Progress) -> int:
    if chosen.kind == "kit":
        if command == "status":
            healthy = lifecycle.is_healthy(place, progress)
            running = lifecycle.find_init(place) is not None
            print("healthy" if healthy else "unhealthy" if running else "down")
            return 0 if healthy else 1
        (lifecycle.up if command == "up" else lifecycle.down)(place, progress)
        return 0
    if command == "up" and chosen.kind == "kind":
        target.up_kind(chosen, progress)
    if command == "down":
        if chosen.kind == "kind":
            target.down_kind(chosen)
        else:
            progress.say("the cluster of KUBECONFIG is yours: nothing to end")
        return 0
    target.require_reachable(chosen)
    progress.say(f"the cluster of {chosen.kubeconfig} answers")
    return 0


def _use(
    options: argparse.Namespace, chosen: target.Target, place: Layout, progress: Progress
) -> int:
    if options.command == "add-fake-nodes" and options.print:
        print(nodes.manifests(options.count))
        return 0
    values = target.exports(chosen, place)
    if options.command == "env":
        for name, value in values.items():
            print(f"export {name}={shlex.quote(value)}")
        return 0
    # Inside the cluster's network no proxy can be reached.
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment = {**(kept if chosen.kind == "kit" else os.environ), **values}
    if options.command == "exec":
        command = options.arguments[options.arguments[:1] == ["--"] :]
        if not command:
            raise KitError("exec needs a command: python3 hack/cluster exec -- kubectl get pods -A")
        full = target.command_in(chosen, place, command)
        os.execvpe(full[0], full, environment)
    if chosen.kind != "kit":
        raise KitError(
            "fake nodes live by the kit's kwok: in a cluster of yours install kwok and apply the "
            "output of `add-fake-nodes N --print`"
        )
    prefix = target.command_in(chosen, place, [])
    if options.command == "karpenter":
        _run_karpenter(options.instance_types, prefix, environment, place, progress)
    if options.command == "add-fake-nodes":
        nodes.add(options.count, prefix, environment)
    else:
        nodes.remove(prefix, environment)
    return 0


def _run_karpenter(
    instance_types: Path,
    prefix: list[str],
    environment: dict[str, str],
    place: Layout,
    progress: Progress,
) -> None:
    """Become Karpenter. Raises KitError."""
    if not instance_types.is_file():
        raise KitError(f"{instance_types} is no file: give the instance types as JSON")
    folder = karpenter.ensure(place, progress)
    run_command([*prefix, "kubectl", "apply", "-f", folder / "crds"], environment)
    arguments = [*prefix, *karpenter.command(folder)]
    os.execvpe(arguments[0], arguments, {**environment, **karpenter.environment(instance_types)})


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes: give 1 or more")
    return int(text)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
