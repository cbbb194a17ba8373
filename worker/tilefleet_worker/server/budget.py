"""What one API key may use: answers in flight and tokens a minute. Knows no HTTP and no engine.

A key may overdraw its tokens once: a request is taken while the balance is above zero, pays for its
prompt at once and for its answer at its end, and the next ones wait until that is made up for.
Reserving the most that an answer could take instead would refuse nearly every request that names
no max_tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tilefleet_worker.errors import ConfigError
from tilefleet_worker.server.replies import ApiError, invalid_value

_SECONDS = 60.0
_RULES = {
    "max_inflight": (1, 65_536),
    "tokens_per_minute": (1, 10**12),
    "priority": (-1000, 1000),
}
OPTIONS = (*_RULES, "salt")


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may do; None is without a limit."""

    max_inflight: int | None = None
    """Answers at the same time."""
    tokens_per_minute: int | None = None
    """Of prompts and answers together; also the most that can be saved up."""
    priority: int = 0
    """The most urgent one that its requests may have, and theirs if they name none."""
    salt: str = ""
    """Keys of one salt share cached prefixes; empty shares with nobody."""

    @classmethod
    def parse(cls, words: Sequence[str]) -> KeyLimits:
        """From `name=value` words. Raises ConfigError that names the word and the rule."""
        found: dict[str, Any] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name == "salt" and value.isascii() and value.isprintable() and 0 < len(value) <= 128:
                found[name] = value
            elif name in _RULES:
                found[name] = _whole(name, value)
            else:
                rule = f"one of {', '.join(f'{option}=...' for option in OPTIONS)}"
                raise ConfigError(f"{word!r} is not an option of an API key: write {rule}")
        return cls(**found)


def _whole(name: str, value: str) -> int:
    least, most = _RULES[name]
    try:
        number = int(value)
    except ValueError:
        number = most + 1
    if not least <= number <= most:
        raise ConfigError(f"{name}={value} of an API key must be from {least} to {most}")
    return number


class Budget:
    """The use of one key. One thread."""

    def __init__(self, limits: KeyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.num_inflight = 0
        self._clock = clock
        self._tokens = float(limits.tokens_per_minute or 0)
        self._counted_seconds = clock()

    def follow(self, limits: KeyLimits) -> None:
        """Take over other limits; what is in flight and what is owed stays."""
        if limits != self.limits:
            self._refill()
            self.limits = limits
            self._tokens = min(self._tokens, float(limits.tokens_per_minute or 0))

    def take(self, num_answers: int, num_prompt_tokens: int) -> None:
        """Use a part of the budget. Raises ApiError 429 when it is used up, and takes nothing."""
        self._check_inflight(num_answers)
        self._refill()
        if self.limits.tokens_per_minute is not None and self._tokens <= 0:
            seconds = math.ceil((1 - self._tokens) * _SECONDS / self.limits.tokens_per_minute)
            message = f"This API key may use {self.limits.tokens_per_minute} tokens a minute."
            raise ApiError(429, "rate_limit_exceeded", message, None, seconds)
        self.num_inflight += num_answers
        self._tokens -= num_prompt_tokens

    def settle(self, num_answers: int, num_tokens: int) -> None:
        """Answers that were taken have ended, with that many tokens generated."""
        self.num_inflight -= num_answers
        self._tokens -= num_tokens

    def _check_inflight(self, num_answers: int) -> None:
        most = self.limits.max_inflight
        if most is None or self.num_inflight + num_answers <= most:
            return
        if num_answers > most:
            message = f"This API key may have {most} answers in flight; this asks for {num_answers}"
            raise invalid_value("n", f"{message}: ask for fewer.")
        message = f"This API key has {self.num_inflight} answers in flight and may have {most}."
        raise ApiError(429, "rate_limit_exceeded", message, None, 1)

    def _refill(self) -> None:
        now = self._clock()
        rate = (self.limits.tokens_per_minute or 0) / _SECONDS
        earned = self._tokens + (now - self._counted_seconds) * rate
        self._tokens = min(earned, float(self.limits.tokens_per_minute or 0))
        self._counted_seconds = now


class Budgets:
    """The budgets of all keys, by their ids. They outlive a change of the key file."""

    def __init__(self) -> None:
        self._by_id: dict[str, Budget] = {}

    def of(self, key_id: str, limits: KeyLimits) -> Budget:
        """The budget of a key, with these limits from now on."""
        budget = self._by_id.setdefault(key_id, Budget(limits))
        budget.follow(limits)
        return budget
