"""The API client against a fake HTTP server that answers what each test tells it to."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from tilefleet_operator import errors
from tilefleet_operator.client import ApiClient
from tilefleet_operator.login import Login, login
from tilefleet_operator.resources import DEPLOYMENTS, LEASES, NODES, PODS, path

Handler = Callable[[web.Request], Awaitable[web.Response]]


class FakeApiServer:
    """Records every request and answers with ``handler``."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.headers: list[dict[str, str]] = []
        self.handler: Handler = self.echo
        self.url = ""

    async def echo(self, request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"resourceVersion": "1"}, "items": []})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append(
            (request.method, request.path, dict(request.query), json.loads(body) if body else None)
        )
        self.headers.append(dict(request.headers))
        return await self.handler(request)


@pytest.fixture
async def server() -> AsyncIterator[FakeApiServer]:
    fake = FakeApiServer()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", fake.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


@pytest.fixture
async def client(server: FakeApiServer) -> AsyncIterator[ApiClient]:
    async with ApiClient(Login(server.url, None, lambda: "secret"), timeout_seconds=0.3) as api:
        yield api


def pod(name: str = "a") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "ns"}}


def answer(status: int, reason: str = "", headers: dict[str, str] | None = None) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        body = {"kind": "Status", "reason": reason, "message": f"because {reason}"}
        return web.json_response(body, status=status, headers=headers)

    return handler


async def test_apply_is_server_side_apply_by_force(
    client: ApiClient, server: FakeApiServer
) -> None:
    await client.apply(PODS, pod(), field_manager="someone")
    method, where, query, body = server.requests[0]
    assert (method, where) == ("PATCH", "/api/v1/namespaces/ns/pods/a")
    assert query == {"fieldManager": "someone", "force": "true"}
    assert body == pod()
    assert server.headers[0]["Content-Type"] == "application/apply-patch+yaml"
    assert server.headers[0]["Authorization"] == "Bearer secret"


async def test_status_is_a_subresource(client: ApiClient, server: FakeApiServer) -> None:
    body = {"metadata": {"name": "a", "namespace": "ns"}, "status": {}}
    await client.apply(DEPLOYMENTS, body, subresource="status")
    assert server.requests[0][1] == (
        "/apis/tilefleet.io/v1alpha1/namespaces/ns/inferencedeployments/a/status"
    )


async def test_a_status_does_not_wait_behind_a_burst(server: FakeApiServer) -> None:
    """The others are answered only once the status is."""
    seen = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        if request.path.endswith("/status"):
            seen.set()
        await seen.wait()
        return await server.echo(request)

    server.handler = handler
    access = Login(server.url, None, lambda: "secret")
    async with ApiClient(access, timeout_seconds=60) as api:
        burst = [asyncio.create_task(api.apply(PODS, pod(f"p{n}"))) for n in range(40)]
        while len(server.requests) < 12:
            await asyncio.sleep(0.005)
        body = {"metadata": {"name": "llm", "namespace": "ns"}, "status": {}}
        await api.apply(DEPLOYMENTS, body, subresource="status")
        await asyncio.gather(*burst)


async def test_delete_names_the_uid(client: ApiClient, server: FakeApiServer) -> None:
    await client.delete(PODS, "ns", "a", "uid-1")
    assert server.requests[0][3]["preconditions"] == {"uid": "uid-1"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (410, errors.Gone),
        (422, errors.Unprocessable),
        (429, errors.TooManyRequests),
        (500, errors.ApiError),
        (503, errors.ApiError),
    ],
)
async def test_each_failure_is_typed_and_keeps_the_servers_words(
    client: ApiClient, server: FakeApiServer, status: int, kind: type[errors.ApiError]
) -> None:
    server.handler = answer(status, "SomeReason")
    with pytest.raises(errors.ApiError, match="because SomeReason") as caught:
        await client.get(PODS, "ns", "a")
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.reason) == (status, "SomeReason")
    assert "get /api/v1/namespaces/ns/pods/a" in str(caught.value)


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("soon", 1.0), (None, 1.0)])
async def test_retry_after(
    client: ApiClient, server: FakeApiServer, header: str | None, seconds: float
) -> None:
    server.handler = answer(429, headers={"Retry-After": header} if header else None)
    with pytest.raises(errors.TooManyRequests) as caught:
        await client.apply(PODS, pod())
    assert caught.value.retry_after_seconds == seconds


async def test_an_error_page_of_a_proxy_is_an_api_error(
    client: ApiClient, server: FakeApiServer
) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(status=502, text="<html>bad gateway</html>")

    server.handler = page
    with pytest.raises(errors.ApiError, match="bad gateway") as caught:
        await client.get(PODS, "ns", "a")
    assert caught.value.status == 502


async def test_a_success_that_is_no_json_is_an_api_error(
    client: ApiClient, server: FakeApiServer
) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>login</html>")

    server.handler = page
    with pytest.raises(errors.ApiError, match="no JSON"):
        await client.get(PODS, "ns", "a")


async def test_a_server_that_hangs_costs_the_time_limit(
    client: ApiClient, server: FakeApiServer
) -> None:
    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(0.8)
        return web.Response()

    server.handler = hang
    started = asyncio.get_running_loop().time()
    with pytest.raises(errors.ApiError, match=r"no answer in 0\.3 s") as caught:
        await client.apply(PODS, pod())
    assert caught.value.status == 0
    assert asyncio.get_running_loop().time() - started < 0.7


async def test_a_broken_connection_is_an_api_error(
    client: ApiClient, server: FakeApiServer
) -> None:
    async def cut(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    server.handler = cut
    with pytest.raises(errors.ApiError) as caught:
        await client.apply(PODS, pod())
    assert caught.value.reason == "Unreachable"


async def test_a_list_is_read_in_chunks(client: ApiClient, server: FakeApiServer) -> None:
    async def pages(request: web.Request) -> web.Response:
        number = int(request.query.get("continue", "0"))
        token = {"continue": str(number + 1)} if number < 2 else {}
        return web.json_response(
            {"metadata": {"resourceVersion": "9", **token}, "items": [pod(str(number))]}
        )

    server.handler = pages
    found = await client.list(PODS, label_selector="x=y")
    assert [item["metadata"]["name"] for item in found.items] == ["0", "1", "2"]
    assert found.resource_version == "9"
    assert [query.get("continue") for _, _, query, _ in server.requests] == [None, "1", "2"]
    assert all(query["labelSelector"] == "x=y" for _, _, query, _ in server.requests)
    assert server.requests[0][1] == "/api/v1/pods"


async def test_an_expired_chunk_starts_the_list_anew_in_one_piece(
    client: ApiClient, server: FakeApiServer
) -> None:
    async def pages(request: web.Request) -> web.Response:
        if "continue" in request.query:
            return await answer(410, "Expired")(request)
        token = {"continue": "later"} if "limit" in request.query else {}
        return web.json_response(
            {"metadata": {"resourceVersion": "9", **token}, "items": [pod("first")]}
        )

    server.handler = pages
    found = await client.list(PODS)
    assert len(found.items) == 1
    assert "limit" not in server.requests[-1][2]


@pytest.mark.parametrize("name", ["../secrets", "a/b", "A", "a..b", "", "a?x=1", "-a", "a" * 254])
def test_no_name_leaves_its_place_in_the_path(name: str) -> None:
    with pytest.raises(errors.ApiError, match="DNS-1123"):
        path(PODS, "ns", name)
    with pytest.raises(errors.ApiError, match="DNS-1123"):
        path(PODS, name, "a")


def test_paths() -> None:
    assert path(NODES, None, "n.example.com") == "/api/v1/nodes/n.example.com"
    assert path(LEASES, "ns", None) == "/apis/coordination.k8s.io/v1/namespaces/ns/leases"


async def test_no_write_without_the_lease(server: FakeApiServer) -> None:
    def lost() -> float:
        raise errors.LeaseLost("gone")

    async with ApiClient(Login(server.url, None, lambda: None), guard=lost) as api:
        for write in (
            api.apply(PODS, pod()),
            api.create(PODS, pod()),
            api.delete(PODS, "ns", "a", "u"),
        ):
            with pytest.raises(errors.LeaseLost):
                await write
        assert server.requests == []
        await api.get(PODS, "ns", "a")
        await api.update(LEASES, pod())  # the Lease itself must be writable, or nobody ever leads
    assert [request[0] for request in server.requests] == ["GET", "PUT"]


async def test_the_lease_is_asked_again_when_a_connection_is_at_hand(
    server: FakeApiServer,
) -> None:
    """A write that waited for its connection past the Lease is not sent."""
    asked: list[None] = []

    def guard() -> float:
        asked.append(None)
        if len(asked) > 1:
            raise errors.LeaseLost("late")
        return 5.0

    for warm in (False, True):
        asked.clear()
        server.requests.clear()
        async with ApiClient(Login(server.url, None, lambda: None), guard=guard) as api:
            if warm:
                await api.get(PODS, "ns", "a")
            with pytest.raises(errors.LeaseLost):
                await api.apply(PODS, pod())
        assert [method for method, *_ in server.requests] == (["GET"] if warm else [])


async def test_a_429_pauses_every_request_but_the_leases(
    client: ApiClient, server: FakeApiServer
) -> None:
    server.handler = answer(429, "TooManyRequests", {"Retry-After": "60"})
    with pytest.raises(errors.TooManyRequests):
        await client.apply(PODS, pod())
    server.handler = server.echo
    await client.get(LEASES, "ns", "lease")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await client.get(PODS, "ns", "a")
    assert [method for method, *_ in server.requests] == ["PATCH", "GET"]


async def test_a_listed_object_says_what_it_is(client: ApiClient, server: FakeApiServer) -> None:
    """As one of a watch does: or the same Service would look different after a restart."""

    async def listed(_: web.Request) -> web.Response:
        items = [{"metadata": {"name": "a"}}]
        return web.json_response({"metadata": {"resourceVersion": "1"}, "items": items})

    server.handler = listed
    found = await client.list(PODS, "ns")
    assert (found.items[0]["apiVersion"], found.items[0]["kind"]) == ("v1", "Pod")


async def test_a_write_may_not_outlast_the_lease(server: FakeApiServer) -> None:
    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(0.8)
        return web.Response()

    server.handler = hang
    async with ApiClient(
        Login(server.url, None, lambda: None), timeout_seconds=10, guard=lambda: 0.2
    ) as api:
        with pytest.raises(errors.ApiError, match=r"no answer in 0\.2 s"):
            await api.apply(PODS, pod())


async def test_requests_are_counted(server: FakeApiServer) -> None:
    seen: list[tuple[str, str, int]] = []

    def observe(verb: str, plural: str, code: int, seconds: float) -> None:
        seen.append((verb, plural, code))

    async with ApiClient(Login(server.url, None, lambda: None), observer=observe) as api:
        await api.list(PODS)
        server.handler = answer(409, "Conflict")
        with pytest.raises(errors.Conflict):
            await api.create(PODS, pod())
    async with ApiClient(Login("http://127.0.0.1:9", None, lambda: None), observer=observe) as api:
        with pytest.raises(errors.ApiError):
            await api.get(PODS, "ns", "a")
    assert seen == [("list", "pods", 200), ("create", "pods", 409), ("get", "pods", 0)]


def kubeconfig(folder: Path, user: dict[str, Any]) -> str:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    where = folder / "kubeconfig"
    where.write_text(yaml.safe_dump(document))
    return str(where)


def test_login_by_kubeconfig(tmp_path: Path) -> None:
    found = login(kubeconfig(tmp_path, {"token": "abc"}))
    assert (found.server, found.token()) == ("http://127.0.0.1:1", "abc")
    assert found.ssl_context is None


def test_a_token_is_read_again_after_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilefleet_operator import login as module

    now, file = [0.0], tmp_path / "token"
    monkeypatch.setattr(module, "_TOKEN_PATH", file)
    file.write_text("one\n")
    token = module._file_token(lambda: now[0])
    assert token() == "one"
    file.write_text("two\n")
    assert token() == "one"
    now[0] = 61
    assert token() == "two"


def test_no_credentials_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigInvalid, match="--kubeconfig"):
        login(str(tmp_path / "none"))
    with pytest.raises(errors.ConfigInvalid, match="service account"):
        login(None)
