"""API keys: which requests may pass. Deny by default; the open paths are a list.

Decides on the path that the router will use, never on a URL built from headers: a Host header can
bend such a URL (CVE-2026-48710).
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from tilefleet_worker.errors import ConfigError
from tilefleet_worker.server.replies import ApiError, error_response

LOGGER = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
METRICS_PATH = "/metrics"


@dataclass(frozen=True, slots=True)
class _Key:
    id: str
    digest: bytes


class KeyFile:
    """API keys of a mounted Secret. Read again when the file changes, so keys rotate live."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when the file cannot be read or holds no key."""
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[_Key, ...] = ()
        try:
            self._read()
        except OSError as error:
            raise ConfigError(f"--api-key-file {path} cannot be read: {error.strerror}") from error
        if not self._keys:
            raise ConfigError(
                f"--api-key-file {path} holds no key: write one `KEY` or `ID KEY` a line"
            )

    def identify(self, presented: str) -> str | None:
        """The id of this key, or None. Compares with every key, so time tells nothing."""
        try:
            self._read()
        except OSError as error:
            LOGGER.warning("API key file is not readable (%s): old keys stay", error.strerror)
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:
            if secrets.compare_digest(key.digest, digest):
                found = key.id
        return found

    def _read(self) -> None:
        status = self._path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return
        self._keys = tuple(
            map(_parse, filter(None, map(_strip, self._path.read_text().split("\n"))))
        )
        self._stamp = stamp


def _strip(line: str) -> str:
    text = line.strip()
    return "" if text.startswith("#") else text


def _parse(line: str) -> _Key:
    """`KEY` or `ID KEY`; a key without an id is known by the beginning of its digest."""
    words = line.split(None, 1)
    digest = hashlib.sha256(words[-1].encode()).digest()
    return _Key(words[0] if len(words) == 2 else digest.hex()[:12], digest)


class RequireKey:
    """Middleware: answers 401 unless the path is open or the request carries a known key.

    Puts the key's id into `scope["state"]["key_id"]`; it is the default cache salt, so that one
    client cannot learn by timing what another has sent.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile, open_paths: frozenset[str]) -> None:
        """open_paths: served without a key."""
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or _path(scope) in self._open_paths:
            await self._app(scope, receive, send)
            return
        key_id = self._keys.identify(_bearer(scope) or "")
        if key_id is None:
            message = "A valid API key is needed: send `Authorization: Bearer KEY`."
            await error_response(ApiError(401, "invalid_api_key", message))(scope, receive, send)
            return
        scope.setdefault("state", {})["key_id"] = key_id
        await self._app(scope, receive, send)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _bearer(scope: Scope) -> str | None:
    """The key of exactly one Authorization header; two headers are nobody's key."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    kind, _, key = values[0].decode("latin-1").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None
