"""The cluster of benchmarks/operator_scale.py: all of Kubernetes that a fleet of it needs, no more.

etcd, kube-apiserver with audit log, kube-scheduler, the garbage collector and the node lifecycle
controller, and kwok, which keeps MI300X nodes and their pods alive.
"""

import asyncio
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from kit.nodes import GPUS, manifest

from tests.faults.view import Admin, ClusterView
from tests.operator.apiserver import ApiServer, binaries, running, started


@asynccontextmanager
async def simulated_cluster(
    replicas: int,
) -> AsyncIterator[tuple[ApiServer, Admin, ClusterView]]:
    """Start it, with MI300X nodes for so many replicas of one device; end it all."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        api = stack.enter_context(running(folder))
        programs, admin_file = binaries(), api.kubeconfig("admin")
        fast = ("--kube-api-qps=300", "--kube-api-burst=600", "--leader-elect=false")
        kwok_stages = sorted((Path(programs["kwok"]).parents[1] / "kwok").glob("*.yaml"))
        for argv in (
            [programs["kube-controller-manager"], f"--kubeconfig={admin_file}", "--secure-port=0",
             "--controllers=garbage-collector-controller,node-lifecycle-controller", *fast],
            [programs["kube-scheduler"], f"--kubeconfig={admin_file}", "--secure-port=0", *fast],
            [programs["kwok"], f"--kubeconfig={admin_file}", "--manage-all-nodes=false",
             "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
             "--node-lease-duration-seconds=40", *(f"--config={path}" for path in kwok_stages)],
        ):  # fmt: skip
            stack.enter_context(started(argv, folder / f"{Path(argv[0]).name}.log"))
        context = ssl.create_default_context(cafile=api.authority)
        admin = await stack.enter_async_context(Admin(api.url, api.tokens["admin"], context))
        nodes = -(-replicas // GPUS)
        for number in range(nodes):
            await admin.send("POST", "/api/v1/nodes", dict(manifest(number)))
        view = ClusterView(admin)
        watching = asyncio.create_task(view.run())
        try:
            yield api, admin, view
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
