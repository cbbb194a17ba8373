"""One pool of HTTP connections to one API server, on which a dead peer is found.

It knows credentials, TLS and sockets. It does not know resources, or what an answer means.
"""

import json
import socket
from collections.abc import Callable, Mapping
from typing import Any, Self

import aiohttp

from tilefleet_operator.errors import ConfigInvalid
from tilefleet_operator.login import Login

CONNECTIONS = 16  # a burst of creates must not take the API server's whole share of one client
RESERVED = 4  # of them, for the answers that somebody waits for
KEEPALIVE = (
    ("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 20_000)
)  # fmt: skip
"""Seconds, a count, and milliseconds: 20 s without a sign of the peer end a connection."""

Guard = Callable[[], float]
"""Raises when nothing may be sent any more; see election.Election.guard."""


class Transport:
    """Sends requests and returns whole answers; use it as an async context manager."""

    def __init__(self, login: Login) -> None:
        self.login = login
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            limit=CONNECTIONS, ssl=self.login.ssl_context or True, socket_factory=_socket
        )
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_ask_again)
        tracing.on_connection_create_end.append(_ask_again)
        self._session = aiohttp.ClientSession(connector=connector, trace_configs=[tracing])
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(
        self,
        method: str,
        where: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        content_type: str,
        guard: Guard | None,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One request and its whole answer: status, headers, body.

        guard: asked once more when a connection is at hand, because getting one may take long.
        Raises aiohttp.ClientError and OSError.
        """
        if self._session is None:
            raise ConfigInvalid("the connections are not open; use `async with` on the client")
        headers = {"Accept": "application/json", "Content-Type": content_type}
        token = self.login.token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        url = self.login.server.rstrip("/") + where
        async with self._session.request(
            method,
            url,
            params=query,
            data=data,
            headers=headers,
            allow_redirects=False,
            trace_request_ctx=guard,
        ) as response:
            return response.status, response.headers, await response.read()


async def _ask_again(_: aiohttp.ClientSession, trace: Any, __: Any) -> None:
    if trace.trace_request_ctx is not None:
        trace.trace_request_ctx()


def _socket(address: Any) -> socket.socket:
    """A socket on which the kernel itself finds a dead peer, and ends it within 20 s."""
    made = socket.socket(address[0], address[1], address[2])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEPALIVE:
        if hasattr(socket, name):  # Linux has them all
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made
