"""The command line: ``run`` the operator, print the ``crd``, ``plan`` a file without a cluster.

Each command imports what it needs: ``plan`` and ``crd`` never load kopf or an API client.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence

from tilefleet_operator.errors import OperatorError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for bad input, said on standard error."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
    except OperatorError as error:
        print(f"tilefleet: {error}", file=sys.stderr)
        return 2
    return status


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(
        prog="tilefleet", description="LLM inference fleets on AMD GPUs.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="run the operator", allow_abbrev=False))
    crd = commands.add_parser("crd", help="print the CustomResourceDefinition", allow_abbrev=False)
    crd.set_defaults(command=_crd)
    plan = commands.add_parser(
        "plan",
        help="show what the operator would do with a file, without a cluster",
        description="Replays plan after plan, as if each took effect at once, until nothing is"
        " left to do. Node objects in the files are the cluster; without any, GPUs count as there.",
        allow_abbrev=False,
    )
    plan.add_argument(
        "-f", "--filename", action="append", required=True, metavar="FILE",
        help="YAML with InferenceDeployment and Node objects; - for standard input; repeatable",
    )  # fmt: skip
    plan.add_argument("-o", "--output", choices=("table", "json"), default="table")
    _add_images(plan)
    plan.set_defaults(command=_plan)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worker-image", default="", help="image for vendor amd")
    parser.add_argument("--worker-cpu-image", default="", help="image for vendor cpu")
    parser.add_argument("--hf-endpoint", default="", metavar="URL", help="instead of the Hub's")


def _add_run(parser: argparse.ArgumentParser) -> None:
    env = os.environ.get
    parser.add_argument(
        "--namespace", default=env("POD_NAMESPACE", "default"),
        help="of the Lease; default: $POD_NAMESPACE",
    )  # fmt: skip
    parser.add_argument(
        "--identity", default=env("POD_NAME", socket.gethostname()),
        help="of this process; default: $POD_NAME, then the host's name",
    )  # fmt: skip
    _add_images(parser)
    parser.add_argument(
        "--watch-namespaces", default="", metavar="A,B", help="only these; default: all"
    )
    parser.add_argument("--probe-port", type=int, default=8080, help="/healthz and /readyz")
    parser.add_argument("--metrics-port", type=int, default=8081, help="/metrics")
    parser.add_argument(
        "--kubeconfig", metavar="FILE", help="default: the pod's own service account"
    )
    parser.add_argument("--lease-name", default="tilefleet-operator")
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    import asyncio

    from tilefleet_operator.desired import Defaults
    from tilefleet_operator.process import Process, RunConfig
    from tilefleet_operator.telemetry import configure_logging

    configure_logging(arguments.log_format)
    config = RunConfig(
        namespace=arguments.namespace,
        identity=arguments.identity,
        defaults=Defaults(
            worker_image=arguments.worker_image,
            worker_cpu_image=arguments.worker_cpu_image,
            hf_endpoint=arguments.hf_endpoint or None,
        ),
        lease_name=arguments.lease_name,
        watch_namespaces=tuple(filter(None, arguments.watch_namespaces.split(","))),
        probe_port=arguments.probe_port,
        metrics_port=arguments.metrics_port,
        kubeconfig=arguments.kubeconfig,
    )

    async def run() -> int:
        return await Process(config).run()

    return asyncio.run(run())


def _crd(_: argparse.Namespace) -> int:
    from tilefleet_operator.crd import render

    print(render(), end="")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from tilefleet_operator.desired import Defaults
    from tilefleet_operator.preview import preview

    defaults = Defaults(
        worker_image=arguments.worker_image,
        worker_cpu_image=arguments.worker_cpu_image,
        hf_endpoint=arguments.hf_endpoint or None,
    )
    print(preview(arguments.filename, defaults, arguments.output))
    return 0
