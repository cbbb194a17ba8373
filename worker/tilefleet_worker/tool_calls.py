"""Tool calls in the text of an answer, by the conventions of the model families.

Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. Llama 3: the answer is
`{"name": …, "parameters": {…}}`. Mistral: `[TOOL_CALLS]` and an array of calls, or, since 2025,
names each followed by its arguments. Arguments are passed on while they are written.
"""

from __future__ import annotations

import json
import re

from tilefleet_worker.json_end import JsonEnd
from tilefleet_worker.output_parser import CallArguments, CallBegins, Part, Said, open_prefix

_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=[{\[])'
)
# A head that is longer is left to the end of the call: looking again and again costs.
_MAX_HEAD = 1024
_NAME = re.compile(r"([A-Za-z0-9_.\-]+)\s*(?:\[CALL_ID\][A-Za-z0-9]*\s*)?(?:\[ARGS\])?\s*$")


class _Call:
    """One call object; or, when its name is known already, its arguments alone."""

    def __init__(self, index: int, name: str | None) -> None:
        self.index = index
        self.raw = ""
        self.begun = False
        self._name = name
        self._end = JsonEnd()
        self._arguments: JsonEnd | None = None

    def push(self, text: str) -> tuple[list[Part], str | None]:
        """Parts of this text, and what follows the call, or None while it goes on."""
        place = self._end.push(text)
        taken = text if place is None else text[:place]
        self.raw += taken
        parts = self._read(taken)
        if place is None:
            return parts, None
        if not self.begun:
            parts += self._whole()
        return parts, text[place:]

    def _read(self, text: str) -> list[Part]:
        if self._arguments is not None:
            return self._pass_on(text)
        if self.begun:
            return []
        if self._name is not None:
            return self._begin(self._name, self.raw)
        head = _HEAD.match(self.raw) if len(self.raw) <= _MAX_HEAD else None
        return [] if head is None else self._begin(_unescaped(head[1]), self.raw[head.end() :])

    def _begin(self, name: str, arguments: str) -> list[Part]:
        self.begun, self._arguments = True, JsonEnd()
        return [CallBegins(self.index, name), *self._pass_on(arguments)]

    def _pass_on(self, text: str) -> list[Part]:
        place = None if self._arguments is None else self._arguments.push(text)
        if place is not None:
            self._arguments, text = None, text[:place]
        return [CallArguments(self.index, text)] if text else []

    def _whole(self) -> list[Part]:
        """A call in an unusual order of fields, read when it is complete."""
        try:
            value = json.loads(self.raw)
        except (ValueError, RecursionError):
            return []
        name = value.get("name")
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(name, str):
            return []
        self.begun = True
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return [CallBegins(self.index, name), CallArguments(self.index, text)]


class ToolCallParser:
    """Reads calls behind a marker; text outside of them is said.

    What turns out to be no call is said too, as it was written.
    """

    def __init__(self, begin: str, end: str = "", *, bare: bool = False) -> None:
        """begin, end: markers around calls; an empty end: calls go on to the answer's end.

        bare: an answer that begins with `{` is a call without a marker.
        """
        self._begin, self._end = begin, end
        self._held = ""
        self._bare = bare
        self._between: str | None = None if begin else ""  # text before the next call; None: text
        self._call: _Call | None = None
        self._num_calls = 0
        self._had_call = False  # since the last marker

    def push(self, text: str) -> list[Part]:
        """Parts that this text completes."""
        self._held += text
        parts: list[Part] = []
        while self._held:
            before = self._state()
            if self._call is not None:
                parts += self._in_call(self._call)
            elif self._between is not None:
                parts += self._look_for_call()
            else:
                parts += self._in_text()
            if self._state() == before:
                break
        return parts

    def _state(self) -> tuple[int, bool, bool]:
        return len(self._held), self._between is None, self._call is None

    def _in_call(self, call: _Call) -> list[Part]:
        parts, rest = call.push(self._held)
        self._held = rest or ""
        if rest is not None:
            self._call, self._had_call = None, True
            if call.begun:
                self._num_calls += 1
            else:
                parts.append(Said(call.raw))
        return parts

    def _look_for_call(self) -> list[Part]:
        """Skip what stands between calls, up to the next one or the end marker."""
        between = self._between or ""
        if self._end and self._held.startswith(self._end):
            self._held, self._between = self._held[len(self._end) :], None
            return [] if self._had_call else [Said(self._begin + between + self._end)]
        if self._held[0] == "{":
            name = _NAME.search(between)
            self._call = _Call(self._num_calls, name[1] if name else None)
            self._between = ""
        elif not (self._end and self._end.startswith(self._held)):
            self._between = between + self._held[0]
            self._held = self._held[1:]
        return []

    def _in_text(self) -> list[Part]:
        if self._bare and self._bare_call():
            return []
        text, found, rest = self._held.partition(self._begin)
        if found:
            self._held, self._between, self._had_call = rest, "", False
            text = text.rstrip("\n")
        else:
            size = len(text) - open_prefix(text, self._begin)
            # Line ends before a call are no answer: they wait for what follows them.
            size = len(text[:size].rstrip("\n"))
            text, self._held = text[:size], text[size:]
        return [Said(text)] if text else []

    def _bare_call(self) -> bool:
        """Whether the answer begins with a call; settles that at its first visible character."""
        start = self._held.lstrip()
        if not start:
            return True
        self._bare = False
        if start[0] != "{":
            return False
        self._held, self._between = start, ""
        return True

    def finish(self) -> list[Part]:
        """Text that waited; a call that was cut before its name is said as it was written."""
        text, self._held = self._held, ""
        if self._call is not None:
            text = "" if self._call.begun else self._call.raw + text
        elif self._between is not None:
            text = "" if self._had_call else self._begin + self._between + text
        return [Said(text)] if text else []


class NamedCall:
    """The whole answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> list[Part]:
        """The text, as arguments."""
        parts: list[Part] = [] if self._begun else [CallBegins(0, self._name)]
        self._begun = True
        return [*parts, CallArguments(0, text)] if text else parts

    def finish(self) -> list[Part]:
        """Nothing is held back."""
        return []


def _unescaped(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text


def family_parser(family: str) -> ToolCallParser:
    """A parser for one answer of a family's model."""
    if family == "hermes":
        return ToolCallParser("<tool_call>", "</tool_call>")
    if family == "mistral":
        return ToolCallParser("[TOOL_CALLS]")
    return ToolCallParser("<|python_tag|>", bare=True)


def family_of(chat_template: str) -> str | None:
    """The family whose convention a chat template teaches its model, or None."""
    for marker, family in (
        ("<tool_call>", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|python_tag|>", "llama3_json"),
        ('"parameters":', "llama3_json"),
    ):
        if marker in chat_template:
            return family
    return None
