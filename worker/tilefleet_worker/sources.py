"""Model sources: a URI becomes a local folder in Hugging Face layout.

Knows where models come from. Does not know what is in the files.
"""

from __future__ import annotations

import io
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tilefleet_worker.errors import ConfigError, ModelError

LOGGER = logging.getLogger(__name__)

CLAIM_MOUNT = Path("/models")
PROGRESS_SECONDS = 2.0
# Weights as safetensors only: pickled weights can run code when they are read.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*"]
_REMEDY = "write file:///path, a path, pvc://claim/path or hf://org/name[@revision]"
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A folder that is already there."""

    folder: Path


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of a model hub, at a branch, tag or commit."""

    repository: str
    revision: str = "main"


def parse_source(uri: str, claim_mount: Path = CLAIM_MOUNT) -> LocalSource | HubSource:
    """What a model URI means. Pure; does not look at any disk.

    claim_mount: where the operator mounts the volume claim of pvc://claim/path.
    Raises ConfigError for an unknown scheme, an empty part, or a path that leaves the claim.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalSource(Path(uri))
    if scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ConfigError(f"{uri!r} is not a local file URI: {_REMEDY}")
        return LocalSource(Path(unquote(parts.path)))
    if scheme == "pvc":
        return LocalSource(claim_mount / _claim_path(uri, rest))
    if scheme == "hf":
        return _hub_source(uri, rest)
    raise ConfigError(f"{uri!r} has the unknown scheme {scheme!r}: {_REMEDY}")


def _claim_path(uri: str, rest: str) -> Path:
    claim, _, path = rest.partition("/")
    if not claim:
        raise ConfigError(f"{uri!r} names no volume claim: write pvc://claim/path")
    inside = Path(path)
    if inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(f"{uri!r} leaves its volume claim: use a path below the claim's root")
    return inside


def _hub_source(uri: str, rest: str) -> HubSource:
    repository, at, revision = rest.partition("@")
    if not _HUB_NAME.fullmatch(repository) or (at and not revision):
        raise ConfigError(
            f"{uri!r} is not a hub repository: write hf://org/name or hf://org/name@rev"
        )
    return HubSource(repository, revision or "main")


def fetch(
    uri: str, cache_dir: Path, hf_endpoint: str = "", claim_mount: Path = CLAIM_MOUNT
) -> Path:
    """The local folder of a model URI; downloads from a hub first, if it is one.

    cache_dir: where downloads are kept; a complete download is used again, also offline.
    hf_endpoint: address of the hub or a mirror; empty means the hub library's own.
    Raises ConfigError for a bad URI and ModelError when the model cannot be had.
    """
    source = parse_source(uri, claim_mount)
    folder = (
        source.folder
        if isinstance(source, LocalSource)
        else _download(source, cache_dir / "hub", hf_endpoint or None)
    )
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelError(
            f"model {uri!r}: the folder {folder} {what}; give the folder that holds config.json"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {uri!r}: {folder / 'config.json'} is missing; is it the right folder?"
        )
    return folder


def _download(source: HubSource, cache_dir: Path, endpoint: str | None) -> Path:
    # Imported here: it takes a quarter of a second and most workers read a folder.
    import huggingface_hub
    from huggingface_hub import errors

    shown = f"hf://{source.repository}@{source.revision}"
    hub = endpoint or "the hub"
    LOGGER.info("download of %s from %s begins", shown, hub)
    began = time.monotonic()
    try:
        folder = huggingface_hub.snapshot_download(
            source.repository,
            revision=source.revision,
            cache_dir=cache_dir,
            endpoint=endpoint,
            allow_patterns=PATTERNS,
            tqdm_class=_progress_class(shown),
            library_name="tilefleet",
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{shown}: {hub} asks for consent; accept it there, give a token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{shown}: {hub} has no such repository, or it is private: check the name, give a token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{shown}: {hub} has no revision {source.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{shown}: {hub} cannot be reached and {cache_dir} holds no complete copy; "
            "check the network or --hf-endpoint"
        ) from error
    except Exception as error:  # HTTP, disk and library errors: they share no other base
        raise ModelError(
            f"{shown}: the download failed: {type(error).__name__}: {error}"
        ) from error
    LOGGER.info("download of %s done in %.1f s", shown, time.monotonic() - began)
    return Path(str(folder))


def _progress_class(shown: str) -> Any:
    """A progress bar class that logs a line every PROGRESS_SECONDS: pod logs have no cursor."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class ProgressLines(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._next_seconds = time.monotonic() + PROGRESS_SECONDS
            super().__init__(*args, **(kwargs | {"file": io.StringIO(), "miniters": 1}))

        def update(self, n: float | None = 1) -> bool | None:
            result: bool | None = super().update(n)
            now = time.monotonic()
            if self.unit == "B" and self.total and now >= self._next_seconds:
                self._next_seconds = now + PROGRESS_SECONDS
                done, total = self.n / 2**20, self.total / 2**20
                LOGGER.info("download of %s: %.1f of %.1f MiB", shown, done, total)
            return result

    return ProgressLines
