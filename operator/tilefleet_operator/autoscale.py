"""decide(history, policy, now): how many replicas the measured load needs, with every input.

    demand      D = arrivals per second × tokens per request, prompt computed + output, tok/s
    capacity    C = tok/s of one replica at full load: observed while saturated, else predicted from
                the fitted duration of an engine step, else as stored in the status
    forward     ceil(D / (target C))
    backlog     ceil((D + Q / 30 s) / (0.95 C))    when a request has waited over 1 s
    candidate   largest of max(forward, ceil(D_t / (0.9 target C))) over the scale-down window

Sized on arrivals, never on completions: completions stop rising exactly when more is needed. Up at
once, down to the candidate in steps. Absence of a sample is never zero load. Why these terms:
docs/design/autoscaling.md. Does not know pods' states, nodes or the API.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tilefleet_operator.load import (
    FAST_SECONDS,
    Mix,
    Series,
    arrival_rate,
    request_mix,
    saturated_capacity,
    series,
)
from tilefleet_operator.observed import History, WorkerStats
from tilefleet_operator.throughput import fit_steps

SLOW_SECONDS = 60.0
STALE_SECONDS = 10.0
BACKLOG_WAIT_SECONDS, BACKLOG_DRAIN_SECONDS, BACKLOG_TARGET = 1.0, 30.0, 0.95
SHRINK_MARGIN = 0.9
# Every decision has one of these codes; they are label values of a metric.
CODES = (
    "NoReplicaReady", "NoAnswer", "Learning", "Grow", "AtMaximum", "SilentReplicas",
    "RequestsWait", "SizeSuits", "YoungHistory", "Interval", "Shrink", "Manual", "Paused",
)  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """The limits of one decision.

    current: replicas wanted until now. ready: UIDs of serving pods. stored_capacity: tok/s of one
    replica from the status, None before the first. last_shrink: time of the last step down.
    stale_seconds: age from which a poll says nothing any more.
    """

    current: int
    minimum: int
    maximum: int
    target: float
    ready: tuple[str, ...] = ()
    up_percent: int = 200
    up_pods: int = 8
    down_window: float = 60.0
    down_percent: int = 25
    down_interval: float = 30.0
    last_shrink: float | None = None
    stored_capacity: float | None = None
    stale_seconds: float = STALE_SECONDS


@dataclass(frozen=True)
class Decision:
    """The wanted number of replicas, and everything it was computed from.

    code: the kind of reason, one of CODES. recommended: what load needs before the limits of
    steps, minimum and maximum. utilization: demand over the ready replicas' capacity. fresh: every
    ready replica answered. wait_seconds: until time alone may change the decision, None when it
    cannot.
    """

    desired: int
    recommended: int
    reason: str
    code: str
    utilization: float | None = None
    capacity_tokens_per_second: float | None = None
    capacity_source: str = ""
    demand_tokens_per_second: float | None = None
    queue_tokens: float = 0.0
    fresh: bool = False
    missing: int = 0
    wait_seconds: float | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Load:
    """What was measured at the time of a decision. demand: tok/s, None while unknown."""

    totals: Series
    mix: Mix | None
    slow: float
    rate: float
    demand: float | None
    waiting: int
    oldest_wait: float
    queue: float
    capacity: float | None
    source: str
    missing: int

    @property
    def backlog(self) -> bool:
        """Requests wait longer than a step explains."""
        return self.waiting > 0 and self.oldest_wait > BACKLOG_WAIT_SECONDS


def capacity(
    history: History, mix: Mix | None, policy: Policy, now: float
) -> tuple[float | None, str]:
    """Tokens per second of one replica at full load, and where the figure comes from."""
    observed = saturated_capacity(history, now)
    if observed is not None:
        return observed, "Observed"
    samples = list(history.latest.values())
    model = fit_steps(history.steps) if mix is not None and samples else None
    if model is not None and mix is not None:
        predicted = model.requests_per_second(
            mix.computed,
            mix.cached,
            mix.output,
            kv_tokens=samples[0].gauges.kv_blocks_total * samples[0].block_size,
            max_concurrent=samples[0].gauges.max_concurrent,
        )
        if predicted:
            return predicted * mix.tokens, "Predicted"
    return policy.stored_capacity, "Stored" if policy.stored_capacity else ""


def decide(history: History, policy: Policy, now: float) -> Decision:
    """The wanted number of replicas at `now`, within minimum and maximum. Pure."""
    held = min(max(policy.current, policy.minimum), policy.maximum)
    if not policy.ready:
        return Decision(held, held, "no replica is ready; holding", "NoReplicaReady")
    answered = _answered(history, policy, now)
    if not answered:
        missing = len(policy.ready)
        return Decision(
            held, held, "no ready replica answers; holding", "NoAnswer", missing=missing
        )
    load = _measure(history, answered, policy, now)
    measured = _described(load, held, policy)
    if load.demand is None or (not load.capacity and load.demand > 0):
        why = "learning the capacity of a replica; holding"
        return replace(measured, reason=why, code="Learning")
    needed = replicas_for(load.demand, load.queue if load.backlog else 0.0, load.capacity, policy)
    full = len(policy.ready) * (load.capacity or 0.0)
    measured = replace(
        measured, recommended=needed, utilization=load.demand / full if full else 0.0
    )
    if needed > held:
        return _grow(measured, held, needed, policy)
    if load.missing:
        why = f"{load.missing} replicas do not answer; not shrinking"
        return replace(measured, reason=why, code="SilentReplicas")
    if load.backlog:
        return replace(measured, reason="requests wait; not shrinking", code="RequestsWait")
    candidate = max(needed, policy.minimum, _peak(load, policy, now))
    return _shrink(measured, held, candidate, history, policy, now)


def _measure(
    history: History, answered: Mapping[str, WorkerStats], policy: Policy, now: float
) -> _Load:
    slow = min(SLOW_SECONDS, max(FAST_SECONDS, policy.down_window))
    totals = series(history)
    mix = request_mix(totals, now, slow)
    rate = arrival_rate(totals, now, slow)
    # A silent replica is taken to be as loaded as its peers.
    share = len(policy.ready) / len(answered)
    tokens = mix.tokens * share if mix is not None else 0.0
    waiting = sum(sample.gauges.waiting for sample in answered.values())
    running = sum(sample.gauges.running for sample in answered.values())
    found, source = policy.stored_capacity, "Stored"
    # An idle fleet teaches nothing: old evidence that fades must not move the figure.
    if rate > 0 or running > 0 or found is None:
        found, source = capacity(history, mix, policy, now)
    return _Load(
        totals=totals,
        mix=mix,
        slow=slow,
        rate=rate,
        demand=rate * tokens if mix is not None or rate == 0 else None,
        waiting=waiting,
        oldest_wait=max(sample.gauges.oldest_wait_seconds for sample in answered.values()),
        queue=waiting * tokens,
        capacity=found,
        source=source,
        missing=len(policy.ready) - len(answered),
    )


def _described(load: _Load, held: int, policy: Policy) -> Decision:
    """The decision to hold, with all inputs in words fit for the status."""
    inputs = {
        "arrivalsPerSecond": f"{load.rate:.3g}",
        "tokensPerRequest": f"{load.mix.tokens:.4g}" if load.mix is not None else "unknown",
        "demandTokensPerSecond": _number(load.demand),
        "capacityTokensPerSecond": f"{_number(load.capacity)} {load.source}".strip(),
        "targetUtilization": f"{policy.target:g}",
        "queueTokens": f"{load.queue:.4g}",
        "oldestWaitSeconds": f"{load.oldest_wait:.2g}",
        "readyReplicas": str(len(policy.ready)),
        "silentReplicas": str(load.missing),
        "limits": f"{policy.minimum}..{policy.maximum}",
    }
    return Decision(
        held,
        held,
        "",
        "",
        capacity_tokens_per_second=load.capacity,
        capacity_source=load.source,
        demand_tokens_per_second=load.demand,
        queue_tokens=load.queue,
        fresh=load.missing == 0,
        missing=load.missing,
        inputs=inputs,
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _peak(load: _Load, policy: Policy, now: float) -> int:
    """Replicas for the largest demand of the scale-down window, with a margin against flapping."""
    if load.mix is None or not load.capacity:
        return 0
    times = [time for time in load.totals.times if time >= now - policy.down_window]
    rate = max([load.rate, *(arrival_rate(load.totals, time, load.slow) for time in times)])
    return _ceil(rate * load.mix.tokens / (SHRINK_MARGIN * policy.target * load.capacity))


def _answered(history: History, policy: Policy, now: float) -> dict[str, WorkerStats]:
    if not history.frames or now - history.frames[-1].time > policy.stale_seconds:
        return {}
    return {uid: history.latest[uid] for uid in policy.ready if uid in history.latest}


def replicas_for(demand: float, queue: float, per_replica: float | None, policy: Policy) -> int:
    """Replicas for a demand, tok/s, and a queue, tokens, before limits; the minimum without C."""
    if not per_replica:
        return policy.minimum
    forward = _ceil(demand / (policy.target * per_replica))
    backlog = 0
    if queue > 0:
        backlog = _ceil((demand + queue / BACKLOG_DRAIN_SECONDS) / (BACKLOG_TARGET * per_replica))
    return max(forward, backlog)


def _ceil(value: float) -> int:
    """Ceiling that forgives rounding: 2.0000000001 is 2."""
    return math.ceil(value - 1e-9)


def _grow(measured: Decision, held: int, needed: int, policy: Policy) -> Decision:
    step = max(policy.up_pods, held * policy.up_percent // 100)
    desired = min(needed, held + step, policy.maximum)
    if desired == held:
        return replace(
            measured,
            reason=f"load needs {needed} replicas, maxReplicas is {policy.maximum}",
            code="AtMaximum",
        )
    why = f"load needs {needed} replicas, more than {held}"
    return replace(measured, desired=desired, reason=why, code="Grow")


def _shrink(
    measured: Decision, held: int, candidate: int, history: History, policy: Policy, now: float
) -> Decision:
    if candidate >= held:
        return replace(measured, reason="the size suits the load", code="SizeSuits")
    known = now - history.frames[0].time
    if known < policy.down_window:
        return replace(
            measured,
            reason="observed for less than the scale-down window",
            code="YoungHistory",
            wait_seconds=policy.down_window - known,
        )
    since = now - policy.last_shrink if policy.last_shrink is not None else math.inf
    if since < policy.down_interval:
        return replace(
            measured,
            reason="waiting for the scale-down interval",
            code="Interval",
            wait_seconds=policy.down_interval - since,
        )
    desired = max(candidate, held - max(1, held * policy.down_percent // 100))
    return replace(
        measured,
        desired=desired,
        reason=f"{candidate} suffice for the largest load of the scale-down window",
        code="Shrink",
    )
