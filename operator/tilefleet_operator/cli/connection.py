"""The user's way to the cluster: kubeconfig, context, namespace, and what is not a verb of the
client: logs, JSON patches, and a worker's /stats through the API server.

It does not know what is read or written.
"""

import argparse
import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from tilefleet_operator.client import ApiClient
from tilefleet_operator.desired import ADMIN_PORT
from tilefleet_operator.errors import ApiError, ObservationInvalid
from tilefleet_operator.login import context_namespace, login
from tilefleet_operator.metrics import read_stats
from tilefleet_operator.observed import MissingStats, PodView, WorkerStats, worker_stats
from tilefleet_operator.resources import PODS, path

FIELD_MANAGER = "kubectl-tilefleet"
_LINE_LIMIT_BYTES = 1 << 20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that kubectl has, too."""
    parser.add_argument(
        "-n", "--namespace", metavar="NAME", help="default: the namespace of the context"
    )
    parser.add_argument(
        "--kubeconfig", metavar="FILE", help="default: $KUBECONFIG, then ~/.kube/config"
    )
    parser.add_argument("--context", metavar="NAME", help="default: the current one")


@dataclass(frozen=True)
class Connection:
    """One open connection. namespace: the one that commands act in."""

    api: ApiClient
    namespace: str
    session: aiohttp.ClientSession

    async def stats(self, pods: Iterable[PodView]) -> dict[str, WorkerStats | MissingStats]:
        """Pod UID → its worker's /stats now, or why there is none."""
        asked = [pod for pod in pods if pod.ip and not pod.finished]
        answers = await asyncio.gather(*(self._stats(pod) for pod in asked))
        return {pod.uid: answer for pod, answer in zip(asked, answers, strict=True)}

    async def _stats(self, pod: PodView) -> WorkerStats | MissingStats:
        where = path(PODS, pod.namespace, pod.name)
        url = f"{self.api.login.server.rstrip('/')}{where}:{ADMIN_PORT}/proxy/stats"
        try:
            return worker_stats(await read_stats(self.session, url))
        except ObservationInvalid as error:
            if "status 403" in str(error):
                return MissingStats("reading load needs the verb get on pods/proxy")
            return MissingStats(str(error)[:200])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return MissingStats(f"no answer: {str(error) or type(error).__name__}"[:200])

    async def json_patch(self, where: str, operations: Sequence[Mapping[str, object]]) -> None:
        """Patch the object at an API path (RFC 6902); all operations or none. Raises ApiError."""
        url = f"{self.api.login.server.rstrip('/')}{where}"
        headers = {"Content-Type": "application/json-patch+json"}
        query = {"fieldManager": FIELD_MANAGER}
        try:
            async with self.session.patch(
                url, data=json.dumps(operations), headers=headers, params=query
            ) as response:
                if response.status >= 400:
                    text = _message(await response.content.read(4096))
                    raise ApiError(response.status, "PatchFailed", text, f"patch {where}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, "Unreachable", str(error), f"patch {where}") from error

    async def log(self, namespace: str, pod: str, query: Mapping[str, str]) -> AsyncIterator[str]:
        """Lines of a pod's log, without their ends. Raises ApiError."""
        where = f"{path(PODS, namespace, pod)}/log"
        url = f"{self.api.login.server.rstrip('/')}{where}"
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10)
        try:
            async with self.session.get(url, params=query, timeout=limits) as response:
                if response.status >= 400:
                    text = _message(await response.content.read(4096))
                    raise ApiError(response.status, "LogFailed", text, f"get {where}")
                async for line in response.content:
                    yield line.decode(errors="replace").rstrip("\n")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiError(0, "Unreachable", str(error), f"get {where}") from error


def _message(payload: bytes) -> str:
    """The server's own words in the Status object of a refusal."""
    try:
        return str(json.loads(payload)["message"])
    except (ValueError, KeyError, TypeError):
        return payload.decode(errors="replace")


@asynccontextmanager
async def connect(arguments: argparse.Namespace) -> AsyncIterator[Connection]:
    """Open what the flags name. Raises ConfigInvalid without usable credentials."""
    default = os.environ.get("KUBECONFIG") or "~/.kube/config"
    file = os.path.expanduser(arguments.kubeconfig or default)
    found = login(file, context=arguments.context)
    namespace = arguments.namespace or context_namespace(file, arguments.context)
    headers = {"Authorization": f"Bearer {token}"} if (token := found.token()) else {}
    connector = aiohttp.TCPConnector(limit=64, ssl=found.ssl_context or True)
    session = aiohttp.ClientSession(
        connector=connector, headers=headers, auto_decompress=False, read_bufsize=_LINE_LIMIT_BYTES
    )
    async with ApiClient(found) as api, session:
        yield Connection(api, namespace, session)
