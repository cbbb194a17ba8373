"""``tilefleet run``: the operator itself."""

import argparse
import os
import socket
from dataclasses import replace
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
        "--worker-network-policy", action=argparse.BooleanOptionalAction, default=True,
        help="give each fleet a NetworkPolicy",
    )  # fmt: skip
    parser.add_argument(
        "--admin-from", type=_names, default=(), metavar="A,B",
        help="namespaces and address blocks (CIDR) that may reach the workers' admin port beside"
        " this one; Prometheus needs it",
    )  # fmt: skip
    parser.add_argument(
        "--device-groups", type=_numbers, default=(), metavar="44,109",
        help="ids of the host's groups that own the GPU devices (render, video)",
    )  # fmt: skip
    parser.add_argument(
        "--balloon-priority-class", default="tilefleet-balloon", metavar="NAME",
        help="PriorityClass of pods that hold warm places (spec.capacity.balloon)",
    )  # fmt: skip
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
        "--lease-seconds", type=float, default=10.0, metavar="SECONDS",
        help="how long the Lease of a dead leader holds; default: 10",
    )  # fmt: skip
    parser.add_argument(
        "--api-qps", type=float, default=1000.0, metavar="N",
        help="requests a second to the API server, Lease and watches apart; default: 1000",
    )  # fmt: skip
    parser.add_argument(
        "--api-burst", type=int, default=2000, metavar="N",
        help="requests at once after a quiet time; default: 2000",
    )  # fmt: skip
    parser.add_argument(
        "--log-format", choices=("json", "text"), default="json", help="of standard error"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM."""
    import asyncio

    from tilefleet_operator.election import LeaseTiming
    from tilefleet_operator.process import Process, RunConfig
    from tilefleet_operator.rate import Rate
    from tilefleet_operator.telemetry import configure_logging

    configure_logging(arguments.log_format)
    config = RunConfig(
        namespace=arguments.namespace,
        identity=arguments.identity,
        defaults=replace(
            defaults(arguments),
            namespace=arguments.namespace,
            network_policy=arguments.worker_network_policy,
            admin_from=arguments.admin_from,
            device_groups=arguments.device_groups,
            balloon_priority_class=arguments.balloon_priority_class,
        ),
        lease_name=arguments.lease_name,
        watch_namespaces=_names(arguments.watch_namespaces),
        probe_port=arguments.probe_port,
        metrics_port=arguments.metrics_port,
        kubeconfig=arguments.kubeconfig,
        timing=LeaseTiming.of(arguments.lease_seconds),
        rate=Rate(arguments.api_qps, arguments.api_burst),
    )

    async def serve() -> int:
        return await Process(config).run()

    return asyncio.run(serve())


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in _names(text))
