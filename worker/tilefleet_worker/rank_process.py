"""A rank behind the first: loads its part of a model and computes what it is told.

`python -m tilefleet_worker rank FD ORDER`, started by rank_group alone. ORDER, JSON: rank, size,
backend, threads, store. It ends when it is told to, when the worker is gone, and on any error,
which it names to the worker. SIGTERM and SIGINT are the worker's: it drains first.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilefleet_worker import gpu_device
from tilefleet_worker.collectives import Collectives
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.factory import load_rank
from tilefleet_worker.rank_messages import Kind, RankRunner

LOGGER = logging.getLogger(__name__)


def rank_process(arguments: Sequence[str]) -> int:
    """Run a rank to its end. Returns the exit status: 0 when it was told to end."""
    descriptor, order = int(arguments[0]), json.loads(arguments[1])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_worker, name="worker", daemon=True).start()
    connection = Connection(descriptor)
    try:
        _serve(connection, order)
    except EOFError:
        LOGGER.error("rank %d: the worker is gone", order["rank"])
        return 1
    except Exception as error:
        LOGGER.exception("rank %d failed", order["rank"])
        with contextlib.suppress(OSError):
            _answer(connection, error=f"failed ({type(error).__name__}: {error})")
        return 1
    return 0


def _serve(connection: Connection, order: dict[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    device = torch.device("cpu")
    if order["backend"] == "triton":
        device = gpu_device.require(order["rank"], order["size"])
    rank, size, store = order["rank"], order["size"], Path(order["store"])
    runner: RankRunner | None = None
    while True:
        message = connection.recv_bytes()
        kind, rest = Kind(int(np.frombuffer(message, np.int32, 1)[0])), message[4:]
        if kind == Kind.STOP:
            return
        if kind == Kind.LOAD:
            runner = None
            told = json.loads(rest)
            config = EngineConfig(**told["config"])
            collectives = Collectives(rank, size, device, config.batch_invariant)
            runner = load_rank(
                Path(told["model_dir"]), config, collectives, device,
                partial(_meet, connection, collectives, store),
            )  # fmt: skip
        elif runner is not None:
            runner.follow(kind, np.frombuffer(rest, np.int32))


def _meet(connection: Connection, collectives: Collectives, store: Path) -> None:
    """Say that this rank's weights are read, and wait for the others."""
    _answer(connection, rank=collectives.rank)
    collectives.join(store)


def _answer(connection: Connection, **answer: object) -> None:
    connection.send_bytes(json.dumps(answer).encode())


def _end_with_worker() -> None:
    """The worker holds the other end of this process's input until it is gone."""
    sys.stdin.buffer.read()
    os._exit(1)
