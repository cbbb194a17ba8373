"""One compilation of one kernel, described for a compiler without a GPU."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation. types: argument → type, all others are constants of the kernel."""

    kernel: Any
    family: str
    case: str
    arch: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of the variant in the stored table."""
        return f"{self.arch} {self.family}: {self.case}"
