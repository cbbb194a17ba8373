"""Kubernetes objects from the user's files: YAML or JSON, many documents, Lists, standard input.

It checks shapes, not meanings.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from tilefleet_operator.errors import ConfigInvalid

Json = dict[str, Any]


def read(filenames: Sequence[str]) -> list[Json]:
    """All objects of the files in their order; ``-`` is standard input, a List its items.

    Raises ConfigInvalid, naming the file, for what cannot be read or is no Kubernetes object.
    """
    return [found for name in filenames for found in _objects(name, _load(name))]


def _load(filename: str) -> list[object]:
    try:
        if filename == "-":
            text = sys.stdin.read()
        else:
            with open(filename, encoding="utf-8") as file:
                text = file.read()
        return [document for document in yaml.safe_load_all(text) if document is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigInvalid(f"{filename}: {error}") from error


def _objects(filename: str, documents: Sequence[object]) -> Iterator[Json]:
    for document in documents:
        if not isinstance(document, dict):
            kind = type(document).__name__
            raise ConfigInvalid(f"{filename}: a document is a {kind}, not a Kubernetes object")
        items = document.get("items")
        if str(document.get("kind", "")).endswith("List") and isinstance(items, list):
            yield from _objects(filename, items)
        elif not isinstance(document.get("metadata"), dict):
            kind = document.get("kind", "object without kind")
            raise ConfigInvalid(
                f"{filename}: a {kind} has no metadata; write apiVersion, kind, metadata and spec"
            )
        else:
            yield document
