"""``tilefleet run``: the operator itself."""

import argparse
import os
import socket
from typing import Any

from tilefleet_operator.cli.plan import add_images, defaults


def add(commands: Any) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser("run", help="run the operator", allow_abbrev=False)
    env = os.environ.get
    parser.add_argument(
        "--namespace", default=env("POD_NAMESPACE", "default"),
        help="of the Lease; default: $POD_NAMESPACE",
    )  # fmt: skip
    parser.add_argument(
        "--identity", default=env("POD_NAME", socket.gethostname()),
        help="of this process; default: $POD_NAME, then the host's name",
    )  # fmt: skip
    add_images(parser)
    parser.add_argument(
        "--watch-namespaces", default="", metavar="A,B", help="only these; default: all"
    )
    parser.add_argument("--probe-port", type=int, default=8080, help="/healthz and /readyz")
    parser.add_argument("--metrics-port", type=int, default=8081, help="/metrics")
    parser.add_argument(
        "--kubeconfig", metavar="FILE", help="default: the pod's own service account"
    )
    parser.add_argument(
        "--lease-name", default="tilefleet-operator", help="one leads for each name"
    )
    parser.add_argument(
        "--log-format", choices=("json", "text"), default="json", help="of standard error"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM."""
    import asyncio

    from tilefleet_operator.process import Process, RunConfig
    from tilefleet_operator.telemetry import configure_logging

    configure_logging(arguments.log_format)
    config = RunConfig(
        namespace=arguments.namespace,
        identity=arguments.identity,
        defaults=defaults(arguments),
        lease_name=arguments.lease_name,
        watch_namespaces=tuple(filter(None, arguments.watch_namespaces.split(","))),
        probe_port=arguments.probe_port,
        metrics_port=arguments.metrics_port,
        kubeconfig=arguments.kubeconfig,
    )

    async def serve() -> int:
        return await Process(config).run()

    return asyncio.run(serve())
