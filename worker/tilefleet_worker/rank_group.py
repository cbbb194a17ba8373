"""The other ranks of a worker: one process each, started, told every step, watched, ended.

The first rank is the worker itself: server, scheduler, engine and its own part of the model. One
socket pair a rank carries the messages of rank_messages; sums and joins inside a step go through
torch.distributed. A rank that ends before it is told to ends the worker: its sums are lost, so no
step could ever be right again. Knows no model and no tensor.
"""

import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tilefleet_worker import termination
from tilefleet_worker.errors import EngineError
from tilefleet_worker.rank_messages import Kind, Words

LOGGER = logging.getLogger(__name__)

START_SECONDS = 300.0
# A process that a rank's death leaves stuck, say in a collective of the GPU, is ended after this.
_STUCK_SECONDS = 20.0
_NOTICE_SECONDS = 10.0
_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Follower:
    """One process and the socket to it."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection


class RankGroup:
    """All ranks but the first. `tell` and `load` are for one thread, the rest for any."""

    def __init__(self, size: int, backend: str, threads: int) -> None:
        """Start the processes. backend: cpu, reference or triton. threads: of each rank."""
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix="tilefleet-ranks-"))
        self._lock = threading.Lock()
        self._dead = threading.Event()
        self._failure: str | None = None
        self._closing = False
        self._closed = threading.Event()
        self._on_death: Callable[[str], None] = _log_only
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        order = {
            "size": size, "backend": backend, "threads": threads, "store": str(self.store)
        }  # fmt: skip
        self._followers = [self._start({**order, "rank": rank}) for rank in range(1, size)]
        self._watchers = [
            threading.Thread(
                target=self._watch, args=(follower,), name=f"rank-{follower.rank}", daemon=True
            )
            for follower in self._followers
        ]
        for watcher in self._watchers:
            watcher.start()

    @property
    def store(self) -> Path:
        """The file over which the ranks meet."""
        return self._folder / "store"

    @property
    def failure(self) -> str | None:
        """Why the group ended before it was told to, or None."""
        return self._failure

    def on_death(self, act: Callable[[str], None]) -> None:
        """Name who is told the reason when a rank dies; at once when one has."""
        with self._lock:
            self._on_death = act
            failure = self._failure
        if failure is not None:
            act(failure)

    def await_all(self) -> list[dict[str, Any]]:
        """Wait for one answer of every rank. Raises EngineError when one of them died."""
        answers = []
        for _ in self._followers:
            try:
                answer = self._answers.get(timeout=START_SECONDS)
            except queue.Empty:
                raise EngineError(
                    f"A rank did not answer within {START_SECONDS:.0f} s: see the log."
                ) from None
            if self._failure is not None:
                raise EngineError(self._failure)
            answers.append(answer)
        return answers

    def broken(self, error: Exception) -> EngineError:
        """The group can no longer compute: a rank's death is the reason, or else this error."""
        if not self._dead.wait(_NOTICE_SECONDS):
            self._fail(f"rank 0 of {self.size} failed in a step ({error}): the others wait for it")
        return EngineError(self._failure or str(error))

    def load(self, order: dict[str, Any]) -> None:
        """Let every rank load its part of a model; `await_all` waits for it."""
        data = json.dumps(order).encode()
        self._send(np.int32(Kind.LOAD).tobytes() + data)

    def tell(self, kind: Kind, words: Words | Sequence[int] = ()) -> None:
        """Send every rank a message, in order. Raises EngineError when one of them is dead."""
        self._send(np.int32(kind).tobytes() + np.asarray(words, np.int32).tobytes())

    def scrub(self, block_ids: Sequence[int]) -> None:
        """Let every rank clean blocks."""
        self.tell(Kind.SCRUB, block_ids)

    def close(self) -> None:
        """End all ranks: told to, or killed when they do not. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        with contextlib.suppress(EngineError):
            self.tell(Kind.STOP)
        for follower in self._followers:
            _end(follower, _END_SECONDS)
        self._closed.set()
        for watcher in self._watchers:
            watcher.join(_END_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    def exit_statuses(self) -> list[int | None]:
        """How each rank ended, as subprocess says it; None: it runs."""
        return [follower.process.poll() for follower in self._followers]

    def _start(self, order: dict[str, Any]) -> _Follower:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tilefleet_worker", "rank", str(theirs.fileno()),
                 json.dumps(order)],
                stdin=subprocess.PIPE,  # its end tells the rank that this process is gone
                pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        return _Follower(order["rank"], process, Connection(ours.detach()))

    def _send(self, message: bytes) -> None:
        if self._failure is not None:
            raise EngineError(self._failure)
        try:
            for follower in self._followers:
                follower.connection.send_bytes(message)
        except OSError as error:
            if not self._closing:
                self._dead.wait(_NOTICE_SECONDS)
            raise EngineError(self._failure or f"a rank cannot be reached: {error}") from error

    def _watch(self, follower: _Follower) -> None:
        """Take in what a rank says until it ends; its end is the group's unless it was told to."""
        last_words = ""
        with contextlib.suppress(EOFError, OSError):
            while True:
                answer = json.loads(follower.connection.recv_bytes())
                if "error" in answer:
                    last_words = answer["error"]
                else:
                    self._answers.put(answer)
        with contextlib.suppress(subprocess.TimeoutExpired):
            follower.process.wait(_NOTICE_SECONDS)
        status = follower.process.poll()
        reason = f"rank {follower.rank} of {self.size} {last_words or _words(status)}"
        self._fail(f"{reason}: every rank holds a part of the model, so the worker ends")

    def _fail(self, reason: str) -> None:
        """The first death counts: it takes the others with it."""
        with self._lock:
            if self._closing or self._failure is not None:
                return
            self._failure = reason
            act = self._on_death
        LOGGER.error("%s", reason)
        self._dead.set()
        for follower in self._followers:
            follower.process.kill()
        self._answers.put({})
        act(reason)
        threading.Thread(target=self._end_if_stuck, name="stuck", daemon=True).start()

    def _end_if_stuck(self) -> None:
        """End this process when the death of a rank does not: it may wait for ever for its sums."""
        if not self._closed.wait(_STUCK_SECONDS):
            termination.write(EngineError(self._failure or ""))
            LOGGER.error("still here %.0f s after a rank died: exit", _STUCK_SECONDS)
            os._exit(1)


def _end(follower: _Follower, seconds: float) -> None:
    try:
        follower.process.wait(seconds)
    except subprocess.TimeoutExpired:
        follower.process.kill()
        follower.process.wait()
    if follower.process.stdin is not None:
        follower.process.stdin.close()
    follower.connection.close()


def _words(status: int | None) -> str:
    if status is None:
        return "closed its socket"
    if status < 0:
        return f"was killed by signal {-status} ({signal.Signals(-status).name})"
    return f"ended with status {status}"


def _log_only(reason: str) -> None:
    """Who is told before anybody asked to be: the log knows already."""
    del reason
