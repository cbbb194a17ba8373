"""Model sources, with a local server that answers like a model hub."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tilefleet_worker import sources
from tilefleet_worker.errors import ConfigError, ModelError
from tilefleet_worker.sources import HubSource, LocalSource, fetch, parse_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": bytes(range(256)) * 4096,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "code.py": b"print()",
}


class Hub(BaseHTTPRequestHandler):
    """The endpoints that a snapshot download uses: revision, tree, resolve."""

    # HTTP/1.0: a connection, and with it its thread, ends with its answer.

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requested.append((self.command, path))
        if path in ("/api/models/acme/tiny/revision/main", "/api/models/acme/tiny/revision/v1"):
            self.reply_json({"id": "acme/tiny", "sha": COMMIT, "siblings": []})
        elif path == f"/api/models/acme/tiny/tree/{COMMIT}":
            self.reply_json([self.entry(name, data) for name, data in FILES.items()])
        elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
            self.reply_file(FILES[path.rpartition("/")[2]])
        elif path.startswith("/api/models/acme/tiny/"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/acme/gated"):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def entry(name, data):
        return {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    def reply_json(self, body):
        self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def reply_file(self, data):
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self.reply(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def reply(self, status, data, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.requested = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_model_is_downloaded_without_code_or_pickle(hub, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sources, "PROGRESS_SECONDS", 0.0)
    caplog.set_level("INFO")
    folder = fetch("hf://acme/tiny", tmp_path, hub.url)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert folder.is_relative_to(tmp_path)
    assert "download of hf://acme/tiny@main from http://127.0.0.1" in caplog.text
    assert " of 1.0 MiB" in caplog.text
    assert not any(path.endswith((".bin", ".py")) for _, path in hub.requested)


def test_revision_is_asked_for(hub, tmp_path):
    fetch("hf://acme/tiny@v1", tmp_path, hub.url)
    assert ("GET", "/api/models/acme/tiny/revision/v1") in hub.requested


def test_complete_copy_serves_while_the_hub_is_away(hub, tmp_path):
    first = fetch("hf://acme/tiny", tmp_path, hub.url)
    assert fetch("hf://acme/tiny", tmp_path, "http://127.0.0.1:9") == first


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://acme/none", "no such repository"),
        ("hf://acme/gated", "asks for consent"),
        ("hf://acme/tiny@v9", "no revision 'v9'"),
    ],
)
def test_hub_refusals_say_what_to_do(hub, tmp_path, uri, words):
    with pytest.raises(ModelError, match=words):
        fetch(uri, tmp_path, hub.url)


def test_hub_that_is_away_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be reached"):
        fetch("hf://acme/tiny", tmp_path, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("file:///models/a%20b", LocalSource(Path("/models/a b"))),
        ("/models/a", LocalSource(Path("/models/a"))),
        ("models/a", LocalSource(Path("models/a"))),
        ("pvc://claim/a/b", LocalSource(Path("/models/a/b"))),
        ("pvc://claim", LocalSource(Path("/models"))),
        ("hf://org/name", HubSource("org/name", "main")),
        ("hf://org/name@refs/pr/1", HubSource("org/name", "refs/pr/1")),
    ],
)
def test_uris_mean_what_they_say(uri, expected):
    assert parse_source(uri) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/x",
        "file://host/x",
        "pvc://",
        "pvc:///x",
        "pvc://claim/../x",
        "pvc://claim//etc",
        "hf://name",
        "hf://org/name@",
        "hf://org/../name",
        "hf://org/name/more",
    ],
)
def test_bad_uris_are_refused(uri):
    with pytest.raises(ConfigError) as caught:
        parse_source(uri)
    assert repr(uri) in str(caught.value)


def test_folder_without_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        fetch(str(tmp_path), tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        fetch(f"file://{tmp_path}/none", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        fetch(f"{tmp_path}/file", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    assert fetch("pvc://claim/a", tmp_path, claim_mount=tmp_path) == tmp_path / "a"
