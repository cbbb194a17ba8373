"""A client of the Kubernetes API: six verbs over plain JSON.

Each request has a time limit, each mutating one passes a guard and a token bucket, each failure is
a typed ApiError. Nothing is retried here: the owner of the key decides, by the backoff of its
queue. It does not know what is written, nor why.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

from tilefleet_operator.api import FIELD_MANAGER
from tilefleet_operator.errors import (
    ApiError,
    ConfigInvalid,
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    TooManyRequests,
    Unprocessable,
)
from tilefleet_operator.login import Login
from tilefleet_operator.rate import TokenBucket
from tilefleet_operator.resources import LEASES, Resource, path

Json = dict[str, Any]
LIST_CHUNK = 500
CONNECTIONS = 16  # a burst of creates must not take the API server's whole share of one client
_ERRORS = {403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone, 422: Unprocessable}


@dataclass(frozen=True, slots=True)
class ListResult:
    """All objects of one list at one resourceVersion."""

    items: tuple[Json, ...]
    resource_version: str


Observer = Callable[[str, str, int, float], None]
"""(verb, plural, HTTP status or 0, seconds) of each request."""


class ApiClient:
    """Requests to one API server over one connection pool; use it as an async context manager."""

    def __init__(
        self,
        login: Login,
        *,
        timeout_seconds: float = 10.0,
        writes: TokenBucket | None = None,
        guard: Callable[[], float] | None = None,
        observer: Observer | None = None,
    ) -> None:
        """guard: returns the seconds left for a write, or raises; see election.Election.guard."""
        self.login = login
        self.timeout_seconds = timeout_seconds
        self.guard = guard
        self._writes = writes or TokenBucket(per_second=50.0, burst=100)
        self._observer = observer
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=CONNECTIONS, ssl=self.login.ssl_context or True)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        timeout_seconds: float | None = None,
    ) -> Json:
        """One object. Raises NotFound."""
        where = path(resource, namespace, name)
        return await self._request("GET", resource, where, verb="get", limit=timeout_seconds)

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
    ) -> ListResult:
        """All objects at one version, in chunks; in one piece if a chunk's token expired."""
        selectors = {"labelSelector": label_selector, "fieldSelector": field_selector}
        query = {key: value for key, value in selectors.items() if value}
        where = path(resource, namespace, None)
        try:
            return await self._list(resource, where, {**query, "limit": str(LIST_CHUNK)})
        except Gone:
            return await self._list(resource, where, query)

    async def _list(self, resource: Resource, where: str, query: Mapping[str, str]) -> ListResult:
        items: list[Json] = []
        token = ""
        while True:
            page_query = {**query, "continue": token} if token else query
            page = await self._request("GET", resource, where, verb="list", query=page_query)
            items += page.get("items") or ()
            token = page["metadata"].get("continue") or ""
            if not token:
                return ListResult(tuple(items), page["metadata"]["resourceVersion"])

    async def apply(
        self,
        resource: Resource,
        body: Mapping[str, Any],
        *,
        field_manager: str = FIELD_MANAGER,
        subresource: str = "",
    ) -> Json:
        """Server-side apply of the object, or of a subresource such as ``status``; forced.

        Put metadata.uid into ``body`` to touch no other object of that name: Conflict otherwise.
        """
        metadata = body["metadata"]
        where = path(resource, metadata.get("namespace"), metadata["name"])
        return await self._request(
            "PATCH",
            resource,
            f"{where}/{subresource}" if subresource else where,
            verb=f"apply_{subresource}" if subresource else "apply",
            query={"fieldManager": field_manager, "force": "true"},
            body=body,
            content_type="application/apply-patch+yaml",
        )

    async def create(
        self, resource: Resource, body: Mapping[str, Any], timeout_seconds: float | None = None
    ) -> Json:
        """Create. Raises Conflict when the name is taken."""
        where = path(resource, body["metadata"].get("namespace"), None)
        query = {"fieldManager": FIELD_MANAGER}
        return await self._request(
            "POST", resource, where, verb="create", query=query, body=body, limit=timeout_seconds
        )

    async def update(
        self, resource: Resource, body: Mapping[str, Any], timeout_seconds: float | None = None
    ) -> Json:
        """Replace the object if its resourceVersion is still the one in ``body``, else Conflict."""
        metadata = body["metadata"]
        where = path(resource, metadata.get("namespace"), metadata["name"])
        query = {"fieldManager": FIELD_MANAGER}
        return await self._request(
            "PUT", resource, where, verb="update", query=query, body=body, limit=timeout_seconds
        )

    async def delete(self, resource: Resource, namespace: str | None, name: str, uid: str) -> Json:
        """Delete exactly the object with this UID. Raises NotFound, or Conflict for another UID."""
        return await self._request(
            "DELETE",
            resource,
            path(resource, namespace, name),
            verb="delete",
            body={"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}},
        )

    async def _request(
        self,
        method: str,
        resource: Resource,
        where: str,
        *,
        verb: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        limit: float | None = None,
    ) -> Json:
        limit = limit or self.timeout_seconds
        if method != "GET" and resource is not LEASES:
            await asyncio.sleep(self._writes.take())
            if self.guard is not None:
                limit = min(limit, self.guard())
        started, status = time.monotonic(), 0
        try:
            async with asyncio.timeout(limit):
                status, headers, payload = await self._send(
                    method, where, query, body, content_type
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = f"no answer in {limit:.3g} s" if isinstance(error, TimeoutError) else str(error)
            raise ApiError(0, "Unreachable", what, f"{verb} {where}") from error
        finally:
            if self._observer is not None:
                self._observer(verb, resource.plural, status, time.monotonic() - started)
        if status >= 400:
            raise _failure(verb, where, status, headers, payload)
        try:
            result: Json = json.loads(payload)
        except ValueError as error:
            raise ApiError(status, "BadBody", f"no JSON: {error}", f"{verb} {where}") from error
        return result

    async def _send(
        self,
        method: str,
        where: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        content_type: str,
    ) -> tuple[int, Mapping[str, str], bytes]:
        if self._session is None:
            raise ConfigInvalid("ApiClient is not open; use it as `async with ApiClient(...)`")
        headers = {"Accept": "application/json", "Content-Type": content_type}
        token = self.login.token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        url = self.login.server.rstrip("/") + where
        async with self._session.request(
            method, url, params=query, data=data, headers=headers, allow_redirects=False
        ) as response:
            return response.status, response.headers, await response.read()


def _failure(
    verb: str, where: str, status: int, headers: Mapping[str, str], payload: bytes
) -> ApiError:
    """The typed error of an answer >= 400, with the server's own message."""
    try:
        answer = json.loads(payload)
        reason, message = str(answer.get("reason") or "Unknown"), str(answer["message"])
    except (ValueError, KeyError, AttributeError):
        reason, message = "Unknown", payload[:200].decode(errors="replace")
    where = f"{verb} {where}"
    if status == 429:
        try:
            retry_after = float(headers.get("Retry-After", ""))
        except ValueError:
            retry_after = 1.0
        return TooManyRequests(status, reason, message[:1000], where, retry_after)
    return _ERRORS.get(status, ApiError)(status, reason, message[:1000], where)
