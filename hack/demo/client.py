"""An unmodified OpenAI client against a fleet: one streamed answer, or a bounded load.

    client.py stream BASE_URL MODEL PROMPT [--max-tokens T] [--ignore-eos]
    client.py load BASE_URL MODEL --clients N --seconds S --max-tokens T

Runs where the Service's address is reachable. `load` prints one JSON line a second:
{"seconds", "completions", "tokens_per_second", "errors"}; SIGTERM ends it early.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import time

import openai

WORDS = (
    "history", "function", "module", "library", "number", "river", "license", "object", "village",
    "string", "exception", "system", "letter", "market", "window", "mountain", "teacher", "error",
)  # fmt: skip


def stream(base_url: str, model: str, prompt: str, max_tokens: int, ignore_eos: bool) -> int:
    """Prints the answer as it comes, then how long it took. Exit status 0 when it ended well."""
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    started, first, finish, usage = time.monotonic(), None, None, None
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True} if ignore_eos else None,
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.monotonic()
                print(choice.delta.content, end="", flush=True)
            finish = choice.finish_reason or finish
    ended = time.monotonic()
    print(flush=True)
    if first is None or finish not in ("stop", "length") or usage is None:
        print(f"the stream ended with finish_reason {finish} and usage {usage}", file=sys.stderr)
        return 1
    rate = usage.completion_tokens / (ended - started)
    print(
        f"[{usage.prompt_tokens} prompt + {usage.completion_tokens} generated tokens, first after "
        f"{first - started:.3f} s, {rate:.0f} tokens/s, finish_reason {finish}]",
        flush=True,
    )
    return 0


class Load:
    """Closed-loop clients: each sends its next request when the last one is answered."""

    def __init__(self, base_url: str, model: str, max_tokens: int) -> None:
        self.base_url, self.model, self.max_tokens = base_url, model, max_tokens
        self.completions = self.tokens = self.errors = 0
        self.last_error = ""

    async def one_client(
        self, client: openai.AsyncOpenAI, number: int, stop: asyncio.Event
    ) -> None:
        """Requests with prompts of their own, so that no prefix is shared by chance."""
        source = random.Random(number)
        while not stop.is_set():
            prompt = " ".join(source.choice(WORDS) for _ in range(40))
            try:
                answer = await client.completions.create(
                    model=self.model, prompt=prompt, max_tokens=self.max_tokens, temperature=1
                )
                self.completions += 1
                self.tokens += answer.usage.completion_tokens if answer.usage else 0
            except openai.OpenAIError as error:
                self.errors += 1
                self.last_error = str(error)[:200]
                await asyncio.sleep(0.5)

    async def run(self, clients: int, seconds: float) -> int:
        """Runs all clients for the time given, with one report a second."""
        stop, started, tokens_before = asyncio.Event(), time.monotonic(), 0
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key="none",
            max_retries=0,
            timeout=60,
            # A Service balances connections: a kept one would stay on the first replica.
            default_headers={"Connection": "close"},
        )
        tasks = [asyncio.create_task(self.one_client(client, n, stop)) for n in range(clients)]
        while not stop.is_set() and time.monotonic() - started < seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1)
            self.report(time.monotonic() - started, self.tokens - tokens_before)
            tokens_before = self.tokens
        stop.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
        return 0 if self.completions else 1

    def report(self, seconds: float, tokens: int) -> None:
        """One JSON line for whoever started the load."""
        line = {
            "seconds": round(seconds, 1),
            "completions": self.completions,
            "tokens_per_second": tokens,
            "errors": self.errors,
            "last_error": self.last_error,
        }
        print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["stream", "load"])
    parser.add_argument("base_url")
    parser.add_argument("model")
    parser.add_argument("prompt", nargs="?", default="Hello")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--ignore-eos", action="store_true")
    arguments = parser.parse_args()
    if arguments.action == "stream":
        return stream(
            arguments.base_url,
            arguments.model,
            arguments.prompt,
            arguments.max_tokens,
            arguments.ignore_eos,
        )
    load = Load(arguments.base_url, arguments.model, arguments.max_tokens)
    return asyncio.run(load.run(arguments.clients, arguments.seconds))


if __name__ == "__main__":
    sys.exit(main())
