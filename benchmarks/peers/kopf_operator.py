"""The plain kopf operator that benchmarks/operator_scale.py measures beside ours.

The least that can be called equivalent: a create handler that posts the pods, an update handler
that reports the generation. It is spared what ours does beyond that: leader election, Service and
other children, readiness, rollouts, drains, repair of drift, conditions. No vendor's product.

    KUBECONFIG=FILE python benchmarks/peers/kopf_operator.py
"""

import asyncio
import os
from typing import Any

import aiohttp
import kopf

from tilefleet_operator.login import login

FLEETS = ("tilefleet.io", "v1alpha1", "inferencedeployments")
ACCESS = login(os.environ["KUBECONFIG"])


@kopf.on.startup()
async def configure(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    settings.posting.enabled = False
    settings.scanning.disabled = True
    connector = aiohttp.TCPConnector(ssl=ACCESS.ssl_context or True)
    memo.session = aiohttp.ClientSession(connector=connector)


@kopf.on.login()
async def log_in(**_: Any) -> kopf.ConnectionInfo:
    return kopf.ConnectionInfo(server=ACCESS.server, ca_path=ACCESS.ca_path, token=ACCESS.token())


@kopf.on.create(*FLEETS)
async def create(
    body: kopf.Body, spec: kopf.Spec, namespace: str, name: str, patch: kopf.Patch, memo: Any,
    **_: Any,
) -> None:  # fmt: skip
    for number in range(spec.get("replicas", 1)):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{name}-{number}"},
            "spec": {
                "containers": [
                    {"name": "worker", "image": "worker:1",
                     "resources": {"limits": {"amd.com/gpu": "1"}}}
                ],
                "tolerations": [{"operator": "Exists"}],
            },
        }  # fmt: skip
        kopf.adopt(pod, owner=dict(body))
        where = f"{ACCESS.server}/api/v1/namespaces/{namespace}/pods"
        headers = {"Authorization": f"Bearer {ACCESS.token()}"}
        async with memo.session.post(where, json=pod, headers=headers) as answer:
            if answer.status not in (201, 409):
                raise kopf.TemporaryError(await answer.text(), delay=1)
    patch.status["observedGeneration"] = body["metadata"]["generation"]


@kopf.on.update(*FLEETS)
async def update(body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
    patch.status["observedGeneration"] = body["metadata"]["generation"]


if __name__ == "__main__":
    kopf.configure(verbose=False)
    asyncio.run(kopf.operator(clusterwide=True, standalone=True))
