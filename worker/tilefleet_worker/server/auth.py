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
from tilefleet_worker.server.budget import OPTIONS, KeyLimits
from tilefleet_worker.server.replies import ApiError, error_response

LOGGER = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
METRICS_PATH = "/metrics"


@dataclass(frozen=True, slots=True)
class Key:
    """One API key: whose it is and what it may do. The key itself is not kept."""

    id: str
    digest: bytes
    limits: KeyLimits


class KeyFile:
    """API keys of a mounted Secret. Read again when the file changes, so keys rotate live."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when the file cannot be read or holds no key."""
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()
        try:
            self._read()
        except OSError as error:
            raise ConfigError(f"--api-key-file {path} cannot be read: {error.strerror}") from error
        if not self._keys:
            raise ConfigError(
                f"--api-key-file {path} holds no key: write `KEY` or `ID KEY [OPTION...]` lines"
            )

    def identify(self, presented: str) -> Key | None:
        """The key, or None. Compares with every key, so time tells nothing."""
        try:
            self._read()
        except OSError as error:
            LOGGER.warning("API key file is not readable (%s): old keys stay", error.strerror)
        except ConfigError as error:
            LOGGER.error("API key file: %s: old keys stay", error)
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:
            if secrets.compare_digest(key.digest, digest):
                found = key
        return found

    def _read(self) -> None:
        status = self._path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # a file with a mistake is read, and complained of, once
        lines = filter(None, map(_strip, self._path.read_text().split("\n")))
        self._keys = tuple(map(_parse, lines))


def _strip(line: str) -> str:
    text = line.strip()
    return "" if text.startswith("#") else text


def _parse(line: str) -> Key:
    """`KEY` or `ID KEY [OPTION...]`; a key without an id is known by the beginning of its digest.

    Raises ConfigError for a bad option; its message holds no key.
    """
    words = line.split()
    if len(words) == 1:
        digest = hashlib.sha256(line.encode()).digest()
        return Key(digest.hex()[:12], digest, KeyLimits())
    # Else `KEY OPTION` would make an id of the key and a key of the option; salts have a `=`, too.
    if "=" in words[0] or words[1].partition("=")[0] in OPTIONS:
        raise ConfigError("an API key with options needs an id without `=`: write ID KEY OPTION...")
    digest = hashlib.sha256(words[1].encode()).digest()
    return Key(words[0], digest, KeyLimits.parse(words[2:]))


class RequireKey:
    """Middleware: answers 401 unless the path is open or the request carries a known key.

    Puts the Key into `scope["state"]["key"]`; its id is the default cache salt, so that one client
    cannot learn by timing what another has sent.
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
        key = self._keys.identify(_bearer(scope) or "")
        if key is None:
            message = "A valid API key is needed: send `Authorization: Bearer KEY`."
            await error_response(ApiError(401, "invalid_api_key", message))(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key
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
