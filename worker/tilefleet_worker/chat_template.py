"""Chat messages to one prompt, by the Jinja template of the model folder, in a sandbox.

The template is the model publisher's code: it sees the messages and a few helpers, cannot reach
Python's internals or change its arguments, and is stopped by a time and an output limit.
"""

from __future__ import annotations

import datetime
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tilefleet_worker.errors import ModelError, RequestError

RENDER_SECONDS = 1.0
OUTPUT_CHARACTERS = 4 * 2**20


class _Refused(Exception):
    """The template itself refused the messages through raise_exception()."""


class _TooMuch(Exception):
    """The template ran too long or wrote too much."""


class _Deadline:
    """The time limit of the rendering that runs in this thread."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def start(self) -> None:
        """Begin a rendering in this thread."""
        self._thread.end = time.monotonic() + RENDER_SECONDS

    def check(self) -> None:
        """Raise _TooMuch when this thread's rendering is out of time."""
        if time.monotonic() > getattr(self._thread, "end", math.inf):
            raise _TooMuch(f"takes longer than {RENDER_SECONDS:g} s")


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which every call looks at the clock first, so that loops of calls end."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self._deadline = deadline
        self.filters["tojson"] = _to_json
        self.globals.update(
            range=_guarded_range(deadline), raise_exception=_raise, strftime_now=_strftime_now
        )

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._deadline.check()
        return super().call(context, obj, *args, **kwargs)


class ChatTemplate:
    """A compiled chat template. Safe to render from several threads at once."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """source: Jinja text. Raises ModelError when it does not parse."""
        self._names = {"bos_token": bos_token, "eos_token": eos_token}
        self._deadline = _Deadline()
        self.source = source
        try:
            self._template = _Sandbox(self._deadline).from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template of the model does not parse: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for these messages, up to where the assistant's answer begins.

        tools: functions that the model may call, as OpenAI's API describes them.
        options: further names that the template may read, such as enable_thinking.
        Raises RequestError 400 when the template refuses the messages or fails on them, or when it
        needs more than RENDER_SECONDS or OUTPUT_CHARACTERS.
        """
        self._deadline.start()
        arguments = {
            **(options or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": list(tools) or None,
        }
        try:
            return self._join(self._template.generate(arguments | self._names))
        except _Refused as error:
            raise _invalid(f"the model's chat template refuses these messages: {error}") from error
        except _TooMuch as error:
            raise _invalid(f"the model's chat template {error} on these messages") from error
        except Exception as error:  # a template is foreign code: it may raise anything
            raise _invalid("the model's chat template fails on these messages") from error

    def _join(self, pieces: Iterable[str]) -> str:
        kept, size = [], 0
        for piece in pieces:
            self._deadline.check()
            size += len(piece)
            if size > OUTPUT_CHARACTERS:
                raise _TooMuch(f"writes more than {OUTPUT_CHARACTERS} characters")
            kept.append(piece)
        return "".join(kept)


def _invalid(message: str) -> RequestError:
    return RequestError(400, "invalid_value", f"{message}.", "messages")


def _guarded_range(deadline: _Deadline) -> Callable[..., Iterator[int]]:
    def guarded(*bounds: int) -> Iterator[int]:
        for value in range(*bounds):
            deadline.check()
            yield value

    return guarded


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON without HTML escapes: Jinja's own filter would change the text that the model sees."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise _Refused(str(message)[:200])


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
