"""Clients that never let go of a fleet: each holds one greedy stream open and opens the next.

    streams.py BASE_URL MODEL --clients N --max-tokens T

Every client has a prompt of its own and asks it again and again. Its first answer, from a fleet
that nobody disturbs, is what each later one must equal. Prints JSON lines: {"event": "undisturbed"}
when every client has its first answer, {"event": "fault", …} for each stream that was refused,
truncated or different, and after SIGTERM, when the last stream has ended, {"event": "end", …} with
the counts. Runs where the Service's address is reachable.
"""

import argparse
import asyncio
import collections
import json
import signal
import sys
import time
from typing import Any

import openai

SUBJECTS = ("a river", "the library", "an old function", "the village", "a letter", "the market")


class Fault(Exception):
    """A stream that did not end as it should; `kind` is refused or truncated."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class Clients:
    """All clients of one run, and the counts of what became of their streams."""

    def __init__(self, base_url: str, model: str, clients: int, max_tokens: int) -> None:
        self.model, self.max_tokens, self.clients = model, max_tokens, clients
        self.counts: collections.Counter[str] = collections.Counter()
        self.stop = asyncio.Event()
        self.longest_seconds = 0.0
        self.api = openai.AsyncOpenAI(
            base_url=base_url,
            api_key="none",
            max_retries=0,
            timeout=900,
            # A Service balances connections: a kept one would stay on the first replica.
            default_headers={"Connection": "close"},
        )

    async def run(self) -> int:
        """Until SIGTERM, then until every open stream has ended. 0 when none was at fault."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop.set)
        undisturbed = await asyncio.gather(*(self._stream(n) for n in range(self.clients)))
        say(event="undisturbed", longest_seconds=round(self.longest_seconds, 1))
        await asyncio.gather(*(self._client(n, text) for n, text in enumerate(undisturbed)))
        await self.api.close()
        say(event="end", longest_seconds=round(self.longest_seconds, 1), **self.counts)
        return 0 if set(self.counts) <= {"equal"} else 1

    async def _client(self, number: int, undisturbed: str) -> None:
        while not self.stop.is_set():
            try:
                text = await self._stream(number)
            except Fault as fault:
                self._fault(number, fault.kind, str(fault))
                await asyncio.sleep(0.5)
                continue
            if text == undisturbed:
                self.counts["equal"] += 1
            else:
                same = len(shared_beginning(text, undisturbed))
                why = f"after {same} of {len(undisturbed)} characters: {text[same:][:80]!r}"
                self._fault(number, "different", why)

    def _fault(self, number: int, kind: str, why: str) -> None:
        self.counts[kind] += 1
        say(event="fault", client=number, kind=kind, why=why[:500], time=time.time())

    async def _stream(self, number: int) -> str:
        """The text of one whole stream. Raises Fault for anything less."""
        text, finish, tokens, started = "", None, 0, time.monotonic()
        try:
            chunks = await self.api.completions.create(
                model=self.model,
                prompt=f"Story {number} of {SUBJECTS[number % len(SUBJECTS)]}:",
                max_tokens=self.max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
        except openai.OpenAIError as error:
            raise Fault("refused", describe(error)) from error
        try:
            async for chunk in chunks:
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                for choice in chunk.choices:
                    text += choice.text
                    finish = choice.finish_reason or finish
        except Exception as error:  # the client passes transport errors through as they are
            raise Fault("truncated", f"after {len(text)} characters: {describe(error)}") from error
        if finish != "length" or tokens != self.max_tokens:
            raise Fault("truncated", f"finish_reason {finish}, {tokens} tokens")
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - started)
        return text


def describe(error: BaseException) -> str:
    """An error with its cause, which holds what the socket said."""
    cause = f" ({error.__cause__!r})" if error.__cause__ else ""
    return f"{type(error).__name__}: {error}{cause}"


def shared_beginning(a: str, b: str) -> str:
    """The longest text that both begin with."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[:length] if length is not None else min(a, b, key=len)


def say(**line: Any) -> None:
    """One JSON line for whoever started the clients."""
    print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()

    async def run() -> int:
        clients = Clients(
            arguments.base_url, arguments.model, arguments.clients, arguments.max_tokens
        )
        return await clients.run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
