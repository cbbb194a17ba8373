"""What the served model was taught: how it calls tools and whether it thinks before it answers."""

from __future__ import annotations

from dataclasses import dataclass

from tilefleet_worker.reasoning import BEGIN, END
from tilefleet_worker.tool_calls import family_of


@dataclass(frozen=True, slots=True)
class Conventions:
    """What the served model was taught: resolved once, from the flags and its chat template."""

    tool_family: str | None
    thinks: bool

    @classmethod
    def of(cls, tool_call_parser: str, reasoning_parser: str, template: str | None) -> Conventions:
        """Resolve `auto` by the markers in the template."""
        source = template or ""
        family = family_of(source) if tool_call_parser == "auto" else tool_call_parser
        thinks = reasoning_parser == "think"
        if reasoning_parser == "auto":
            thinks = BEGIN in source or END in source
        return cls(None if family == "none" else family, thinks)

    @property
    def flags(self) -> tuple[str, str]:
        """The values of the two flags that `auto` came to."""
        return self.tool_family or "none", "think" if self.thinks else "none"
