"""API keys: denied by default, on the path, and rotated live."""

import os

import httpx
import pytest

from tilefleet_worker.config import parse_args
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.server.answers import AnswerDesk
from tilefleet_worker.server.api import Api
from tilefleet_worker.server.app import create_app, routes
from tilefleet_worker.server.auth import OPEN_PATHS, KeyFile
from tilefleet_worker.server.metrics import Metrics
from tilefleet_worker.server.model_api import ModelApi
from tilefleet_worker.server.state import WorkerState


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# clients\nalice secret-one\nsecret-two\n\n")
    return path


@pytest.fixture
def app(key_file):
    state = WorkerState(parse_args(["--model", "tiny"]))
    metrics = Metrics(state)
    return create_app(state, AnswerDesk(metrics), metrics, KeyFile(key_file))


def client(app, **options):
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False),
        base_url="http://worker",
        **options,
    )


def paths():
    state = WorkerState(parse_args(["--model", "tiny"]))
    table = routes(Api(state, AnswerDesk(Metrics(state))), ModelApi(state))
    return [(m, r.path.replace("{id:path}", "x")) for r in table for m in sorted(r.methods)]


@pytest.mark.parametrize(("method", "path"), [*paths(), ("GET", "/nothing"), ("OPTIONS", "/v1")])
async def test_every_route_needs_a_key_except_the_listed(app, method, path):
    async with client(app) as http:
        reply = await http.request(method, path)
    if path in OPEN_PATHS:
        assert reply.status_code == 503  # reached: not loaded here
        return
    assert reply.status_code == 401
    if method != "HEAD":
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "secret-one"},
        {"Authorization": "Basic secret-one"},
        {"Authorization": "Bearer alice"},
        {"Authorization": "Bearer alice secret-one"},
        {"Host": "worker/health?", "X-Forwarded-Prefix": "/health"},
    ],
)
async def test_wrong_keys_and_bent_hosts_are_refused(app, header):
    async with client(app, headers=header) as http:
        assert (await http.get("/version")).status_code == 401


async def test_two_authorization_headers_are_refused(app):
    headers = [("Authorization", "Bearer secret-one"), ("Authorization", "Bearer secret-two")]
    async with client(app) as http:
        assert (await http.get("/version", headers=headers)).status_code == 401


@pytest.mark.parametrize("key", ["secret-one", "secret-two"])
async def test_known_keys_pass(app, key):
    async with client(app, headers={"Authorization": f"Bearer {key}"}) as http:
        assert (await http.get("/version")).status_code == 200


async def test_keys_rotate_without_a_restart(app, key_file):
    """A Secret volume replaces the file: the old key stops and the new one works."""
    fresh = key_file.with_name("fresh")
    fresh.write_text("secret-three\n")
    os.replace(fresh, key_file)
    async with client(app) as http:
        for key, status in (("secret-one", 401), ("secret-three", 200)):
            reply = await http.get("/version", headers={"Authorization": f"Bearer {key}"})
            assert reply.status_code == status
    key_file.unlink()
    async with client(app, headers={"Authorization": "Bearer secret-three"}) as http:
        assert (await http.get("/version")).status_code == 200


def test_key_identity_is_the_id_or_a_digest(key_file):
    keys = KeyFile(key_file)
    assert keys.identify("secret-one").id == "alice"
    assert keys.identify("secret-two").id not in ("", "secret-two")
    assert keys.identify("secret") is None
    assert keys.identify("\udc80") is None


def test_missing_and_empty_key_files_are_configuration_errors(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFile(tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        KeyFile(tmp_path / "empty")


def test_keys_do_not_share_prefix_blocks(start_worker, key_file):
    """The key's id salts the prefix cache, so timing tells nothing about others' prompts."""
    worker = start_worker("--api-key-file", str(key_file)).wait_ready()

    def cached(key):
        body = {"model": "tiny", "prompt": "p" * 64, "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"}
        reply = httpx.post(worker.api + "/v1/completions", json=body, headers=headers)
        return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("secret-one"), cached("secret-one")] == [0, 48]
    assert cached("secret-two") == 0
    assert "secret" not in worker.log
