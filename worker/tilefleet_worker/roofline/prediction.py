"""Predictions: the larger of reading time and computing time, at shares of the peaks."""

from collections.abc import Iterator
from dataclasses import dataclass

from tilefleet_worker.price import dollars_per_million
from tilefleet_worker.roofline.accelerators import Accelerator
from tilefleet_worker.roofline.costs import Costs

FORMULA = (
    "step seconds = max(bytes / (bandwidth · {bandwidth}), FLOPs / (peak · {compute})); bytes: the"
    " weights a step reads, experts under uniform routing, and the KV; perfect overlap, no time for"
    " launches, host or network"
)
BATCHES = ((64, 8192), (128, 32768))
"""(requests, tokens of context of each) of the decode rows."""
SINGLE = 4096
"""Prompt tokens of the latency row."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of the peaks that are reached, and what an hour of a device costs.

    0.81 and 0.45: what practitioners report of MI300X; ours on an H100: docs/design/gpu-engine.md.
    memory: share of the device that weights and KV may take, as --gpu-memory-fraction.
    """

    bandwidth: float = 0.81
    compute: float = 0.45
    memory: float = 0.92


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row. Times and rates are None where the model does not fit the device."""

    accelerator: str
    case: str
    batch: int
    context: int
    memory_bytes: float
    """Weights and KV."""
    largest_batch: int
    """Requests of this context that fit; 0: not even the weights and one request."""
    step_seconds: float | None
    tokens_per_second: float | None
    bound: str
    """memory, compute, or does not fit."""
    prefill_seconds: float | None = None
    """Of the prompt, in the latency row."""
    dollars_per_million: float | None = None
    """Of output tokens, at full load all the time."""


def predict(
    costs: Costs, accelerator: Accelerator, assumed: Assumptions, price: float | None
) -> Iterator[Prediction]:
    """The rows of a model on a device. price: of an hour of it; None: no cost."""
    for batch, context in BATCHES:
        yield _decode(costs, accelerator, assumed, price, f"batch {batch}", (batch, context))
    yield _decode(costs, accelerator, assumed, price, "single", (1, SINGLE))


def _decode(
    costs: Costs,
    accelerator: Accelerator,
    assumed: Assumptions,
    price: float | None,
    case: str,
    size: tuple[int, int],
) -> Prediction:
    batch, context = size
    room = accelerator.memory_bytes * assumed.memory - costs.weight_bytes
    largest = max(0, int(room // costs.kv_bytes(context)))
    memory = costs.weight_bytes + batch * costs.kv_bytes(context)
    if largest < batch:
        return Prediction(
            accelerator.name, case, batch, context, memory, largest, None, None, "does not fit"
        )
    read = costs.step_weight_bytes(batch) + batch * costs.kv_read_bytes(context)
    seconds, bound = _seconds(read, batch * costs.token_flops(context), accelerator, assumed)
    rate = batch / seconds
    return Prediction(
        accelerator.name, case, batch, context, memory, largest, seconds, rate, bound,
        _prefill(costs, accelerator, assumed, context) if batch == 1 else None,
        None if price is None else dollars_per_million(price, rate),
    )  # fmt: skip


def _prefill(costs: Costs, accelerator: Accelerator, assumed: Assumptions, length: int) -> float:
    """Seconds of a prompt in one step; its tokens see half of it on average."""
    flops = length * costs.token_flops(length // 2)
    read = costs.step_weight_bytes(length) + costs.kv_bytes(length)
    return _seconds(read, flops, accelerator, assumed)[0]


def _seconds(
    read: float, flops: float, accelerator: Accelerator, assumed: Assumptions
) -> tuple[float, str]:
    reading = read / (accelerator.bytes_per_second * assumed.bandwidth)
    computing = flops / (accelerator.flops * assumed.compute)
    return (reading, "memory") if reading >= computing else (computing, "compute")
