"""Typed access to one JSON object, with errors that name file, key, rule and value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilefleet_worker.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, found {type(value).__name__}.")
    return value


class ConfigReader:
    """One object of a config file. A key that is missing or null has its default, if there is one.

    Every method raises ModelError when the value breaks its rule.
    """

    def __init__(
        self, raw: Mapping[str, Any], source: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Source names the file, and the object in it, in errors."""
        given = {key: value for key, value in raw.items() if value is not None}
        self._raw = {**(defaults or {}), **given}
        self.source = source

    def error(self, key: str, rule: str) -> ModelError:
        """What is wrong with a key."""
        found = repr(self._raw[key]) if key in self._raw else "nothing"
        return ModelError(f"{self.source}: {key} must be {rule}, found {found}.")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._raw.get(key, default)

    def positive(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._raw.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.error(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._raw.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of some words."""
        value = self._raw.get(key, default)
        if value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}")
        return str(value)

    def list_of(self, key: str, length: int, allowed: tuple[str, ...]) -> list[str] | None:
        """A list of so many of these words; None when the key is missing."""
        value = self._raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or set(value) - set(allowed):
            raise self.error(key, f"a list of {length} of {', '.join(allowed)}")
        return [str(item) for item in value]

    def child(self, key: str, defaults: Mapping[str, Any] | None = None) -> "ConfigReader":
        """The object under a key; empty when the key is missing."""
        value = self._raw.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return ConfigReader(value, f"{self.source}: {key}", defaults)

    def keys(self) -> set[str]:
        """Keys that have a value."""
        return set(self._raw)
