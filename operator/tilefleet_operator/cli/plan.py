"""``tilefleet plan``: what the operator would do with files, without a cluster."""

import argparse
from typing import Any

from tilefleet_operator.cli import output

_EPILOG = """\
examples:
  tilefleet plan -f fleet.yaml
  tilefleet plan -f a.yaml -f b.yaml --nodes nodes.yaml     b gets what a leaves of the devices
  kubectl get nodes,pods -A -o yaml | tilefleet plan -f fleet.yaml --nodes -
  kubectl get infd,services,pods,nodes -A -o json | tilefleet plan -f -

exit status: 0, or 2 when a file or an object in it cannot be used
"""


def add(commands: Any) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "plan",
        help="show what the operator would do with files, without a cluster",
        description="Replays plan after plan, as if each took effect at once, until nothing is"
        " left to do: every action with its reason, the conditions at the end, and a verdict on"
        " every AMD node. A simulated replica is ready 5 s after it was placed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-f", "--filename", action="append", required=True, metavar="FILE",
        help="YAML or JSON with InferenceDeployments and, if wanted, Nodes and Pods; - for standard"
        " input; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--nodes", action="append", default=[], metavar="FILE",
        help="Nodes to place on, and Pods whose devices are in use; without any Node, GPUs count"
        " as there; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table",
        help="json holds the whole objects; default: table",
    )  # fmt: skip
    add_images(parser)
    parser.set_defaults(command=run)


def add_images(parser: argparse.ArgumentParser) -> None:
    """Flags that supply defaults to every fleet."""
    parser.add_argument(
        "--worker-image", default="", metavar="IMAGE", help="of fleets with vendor amd"
    )
    parser.add_argument(
        "--worker-cpu-image", default="", metavar="IMAGE", help="of fleets with vendor cpu"
    )
    parser.add_argument(
        "--hf-endpoint", default="", metavar="URL", help="of hf:// models, instead of the Hub's"
    )


def defaults(arguments: argparse.Namespace) -> Any:
    """What these flags supply, as desired.Defaults."""
    from tilefleet_operator.desired import Defaults

    return Defaults(
        worker_image=arguments.worker_image,
        worker_cpu_image=arguments.worker_cpu_image,
        hf_endpoint=arguments.hf_endpoint or None,
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the previews. Raises ConfigInvalid or SpecInvalid for bad input."""
    from tilefleet_operator.api import KIND
    from tilefleet_operator.cli import documents
    from tilefleet_operator.errors import ConfigInvalid
    from tilefleet_operator.preview import preview, scene

    found = scene(documents.read([*arguments.filename, *arguments.nodes]))
    if not found.fleets:
        raise ConfigInvalid(f"no {KIND} in {', '.join(arguments.filename)}; nothing to plan")
    shown = preview(found, defaults(arguments))
    if arguments.output == "json":
        print(output.dump([one.as_json() for one in shown]))
    else:
        print("\n\n".join(table(one.as_json()) for one in shown))
    return 0


def table(shown: dict[str, Any]) -> str:
    """A preview as text: title, actions, placement, conditions."""
    replicas = shown["replicas"]
    title = (
        f"{shown['namespace']}/{shown['name']}: {replicas['desiredReplicas']} wanted,"
        f" {replicas['readyReplicas']} ready at the end"
    )
    rows = [
        (f"{step['seconds']:g}", one["action"], f"{one['kind']}/{one['name']}", one["why"])
        for step in shown["steps"]
        for one in step["actions"]
    ]
    actions = output.table([("SECOND", "ACTION", "OBJECT", "WHY"), *rows])
    done = [title, *(actions if rows else ["nothing to do"])]
    return output.lines(done, placement(shown["placement"]), conditions(shown["conditions"]))


def placement(shown: dict[str, Any] | None) -> list[str]:
    """The verdict on every AMD node; no lines without one."""
    if shown is None:
        return []
    rows = [("NODE", "FREE", "VERDICT")]
    for one in shown["matching"]:
        whole = one["free"] // shown["devicesPerReplica"]
        rows.append((one["node"], f"{one['free']}/{one['total']}", f"room for {whole}"))
    rows += [(one["node"], "-", f"refused: {one['why']}") for one in shown["refused"]]
    return output.table(rows) if len(rows) > 1 else ["the cluster has no AMD node"]


def conditions(shown: list[dict[str, Any]]) -> list[str]:
    """The conditions of a status as a table."""
    rows = [("CONDITION", "STATUS", "REASON", "MESSAGE")]
    rows += [(c["type"], c["status"], c["reason"], c.get("message", "")) for c in shown]
    return output.table(rows, {"Unknown": "warn"})
