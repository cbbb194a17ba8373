"""A client of the Kubernetes API: six verbs over plain JSON.

Each request has a time limit and passes one token bucket, which a 429 pauses; each mutating one
passes a guard; each failure is a typed ApiError. A status never waits behind all the other writes:
connections are kept for it. Nothing is retried here: the owner of the key decides, by the backoff
of its queue. The Lease passes neither: it must never wait. It does not know what is written, nor
why.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

from tilefleet_operator.api import FIELD_MANAGER
from tilefleet_operator.errors import (
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    TooManyRequests,
    Unprocessable,
)
from tilefleet_operator.login import Login
from tilefleet_operator.rate import Rate, TokenBucket
from tilefleet_operator.resources import LEASES, Resource, path
from tilefleet_operator.transport import CONNECTIONS, RESERVED, Transport

Json = dict[str, Any]
LIST_CHUNK = 500
NO_VERSION = "1"
"""A resourceVersion that no object has: etcd's first revision is that of the empty store. The API
server compares it with the one of an object that is there, and ignores it where there is none."""
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
        rate: Rate | None = None,
        guard: Callable[[], float] | None = None,
        observer: Observer | None = None,
    ) -> None:
        """guard: returns the seconds left for a write, or raises; see election.Election.guard."""
        self.timeout_seconds = timeout_seconds
        self.guard = guard
        rate = rate or Rate(per_second=1000.0, burst=2000)
        self._tokens = TokenBucket(rate.per_second, rate.burst)
        self._observer = observer
        self._others = asyncio.Semaphore(CONNECTIONS - RESERVED)
        self.login = login
        self._transport = Transport(login)

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.__aexit__()

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
            # The items of a list of built-in kinds do not say what they are; those of a watch do.
            what = {"apiVersion": resource.api_version, "kind": resource.kind}
            items += [what | item for item in page.get("items") or ()]
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
        only_new: bool = False,
    ) -> Json:
        """Server-side apply of the object, or of a subresource such as ``status``; forced.

        Put metadata.uid into ``body`` to touch no other object of that name: Conflict otherwise.
        only_new: create it; Conflict when the name is taken, by whomever.
        """
        metadata = body["metadata"]
        if only_new:
            body = {**body, "metadata": {**metadata, "resourceVersion": NO_VERSION}}
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
        guard = None if method == "GET" or resource is LEASES else self.guard
        if resource is not LEASES:
            await asyncio.sleep(self._tokens.take())
        if guard is not None:
            limit = min(limit, guard())
        started, status = time.monotonic(), 0
        lane: AbstractAsyncContextManager[None]
        lane = nullcontext() if verb == "apply_status" else self._others
        try:
            async with asyncio.timeout(limit), lane:
                status, headers, payload = await self._transport.send(
                    method, where, query, body, content_type, guard
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = f"no answer in {limit:.3g} s" if isinstance(error, TimeoutError) else str(error)
            raise ApiError(0, "Unreachable", what, f"{verb} {where}") from error
        finally:
            if self._observer is not None:
                self._observer(verb, resource.plural, status, time.monotonic() - started)
        if status >= 400:
            failure = _failure(verb, where, status, headers, payload)
            if isinstance(failure, TooManyRequests):
                self._tokens.pause(failure.retry_after_seconds)
            raise failure
        try:
            result: Json = json.loads(payload)
        except ValueError as error:
            raise ApiError(status, "BadBody", f"no JSON: {error}", f"{verb} {where}") from error
        return result


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
