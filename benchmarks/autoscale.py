"""The autoscaler's own decide() and rules of others, on simulated fleets under equal requests.

Each rule runs the same arrivals (Poisson, lognormal lengths) on replicas with one step model. A
request meets its objectives when its first token comes within 2.0 s and its mean time per further
token stays within 52.5 ms. Ours sees what workers publish at /stats every 2 s and learns the
capacity from that; the others see the same gauges, exactly and at once. Not modelled: failures,
prefix caches, imbalance of a Service. A simulation compares rules, not products.

Source of the engine model, the first three traces and the rules: their projects' documents; KEDA
ceil(waiting / 5) every 30 s, HPA's formula on KV use every 15 s, both with HPA's default behaviour.
"""

import argparse
import heapq
import json
import math
import random
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from tilefleet_operator.autoscale import Policy, decide
from tilefleet_operator.observed import Counters, Gauges, History, Step, WorkerStats

A, B, C, D = 0.012, 8.3e-5, 3e-5, 4e-8  # seconds: a step, prefill token, sequence, KV token
KV_TOKENS, MAX_CONCURRENT, CHUNK, BLOCK = 400_000, 256, 8192, 16
TICK, SECONDS, MINIMUM, MAXIMUM, FIRST = 0.25, 2700.0, 1, 14, 2
TTFT, ITL = 2.0, 0.0525
TARGET = 0.85


@dataclass(slots=True, order=True)
class Request:
    """One request: arrival time, prompt and output tokens, and when its tokens came."""

    arrived: float
    prompt: int = field(compare=False)
    output: int = field(compare=False)
    left: int = field(compare=False)  # prompt tokens not computed yet
    first: float = field(default=math.inf, compare=False)
    last: float = field(default=math.inf, compare=False)

    def met(self) -> bool:
        """Whether both objectives hold; of an ended request."""
        per_token = (self.last - self.first) / max(1, self.output - 1)
        return self.first - self.arrived <= TTFT and per_token <= ITL


class Replica:
    """An engine: continuous batching with chunked prefill; time runs in steps of its own."""

    def __init__(self, ready_at: float) -> None:
        self.ready_at = self.clock = ready_at
        self.draining = False
        self.waiting: deque[Request] = deque()
        self.prefill: deque[Request] = deque()
        self.decoding: list[tuple[int, Request]] = []  # (step of the last token, request)
        self.step = self.reserved = self.context = 0
        self.counts = dict.fromkeys(("arrivals", "computed", "generated", "completions"), 0)
        self.busy = 0.0
        self.recent: deque[Step] = deque(maxlen=64)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self.prefill) + len(self.decoding)

    @property
    def load(self) -> int:
        """Requests in the batch and in the queue."""
        return self.running + len(self.waiting)

    def arrive(self, request: Request) -> None:
        """Queue a request."""
        self.counts["arrivals"] += 1
        self.waiting.append(request)

    def run(self, until: float) -> None:
        """Steps up to a time; the last one may end later, and the next begins then."""
        while self.clock < until:
            self._admit()
            if self.running:
                self._forward(until)
            else:
                ahead = self.waiting[0].arrived if self.waiting else until
                self.clock = min(until, ahead)

    def _admit(self) -> None:
        while self.waiting and self.running < MAX_CONCURRENT:
            size = self.waiting[0].prompt + self.waiting[0].output
            if self.waiting[0].arrived > self.clock or self.reserved + size > KV_TOKENS:
                return
            self.reserved += size
            self.prefill.append(self.waiting.popleft())

    def _forward(self, until: float) -> None:
        tokens = 0
        done: list[Request] = []
        while self.prefill and tokens < CHUNK:
            request = self.prefill[0]
            part = min(request.left, CHUNK - tokens)
            request.left -= part
            tokens += part
            if not request.left:
                done.append(self.prefill.popleft())
        sequences = self.running + len(done)
        seconds = A + B * tokens + C * sequences + D * self.context
        count = 1
        if not tokens:
            ends = self.decoding[0][0] - self.step
            count = max(1, min(ends, int((until - self.clock) / seconds)))
        self.recent.append(Step(seconds, tokens, sequences, self.context))
        self.step += count
        self.clock += count * seconds
        self.busy += count * seconds
        decoded = count * len(self.decoding)
        self.context += tokens + decoded
        self.counts["computed"] += tokens
        self.counts["generated"] += decoded + len(done)
        for request in done:
            request.first = self.clock
            heapq.heappush(self.decoding, (self.step + request.output - 1, request))
        while self.decoding and self.decoding[0][0] <= self.step:
            _, request = heapq.heappop(self.decoding)
            request.last = self.clock
            self.counts["completions"] += 1
            self.reserved -= request.prompt + request.output
            self.context -= request.prompt + request.output - 1

    def stats(self, now: float) -> WorkerStats:
        """What its worker would answer at /stats."""
        oldest = now - self.waiting[0].arrived if self.waiting else 0.0
        return WorkerStats(
            uptime_seconds=now - self.ready_at,
            ready=True,
            block_size=BLOCK,
            counters=Counters(
                arrivals=self.counts["arrivals"],
                prompt_tokens_computed=self.counts["computed"],
                generated_tokens=self.counts["generated"],
                completions=self.counts["completions"],
                steps=self.step,
                busy_seconds=self.busy,
            ),
            gauges=Gauges(
                running=self.running,
                waiting=len(self.waiting),
                oldest_wait_seconds=oldest,
                kv_blocks_total=KV_TOKENS // BLOCK,
                kv_blocks_used=self.reserved // BLOCK,
                max_concurrent=MAX_CONCURRENT,
            ),
            steps=tuple(self.recent),
        )


def step_trace(now: float) -> tuple[float, float, float]:
    rate = next((r for end, r in ((300, 3), (1200, 30), (1380, 50), (2000, 12)) if now < end), 4)
    return rate, 1000, 300


def ramp_trace(now: float) -> tuple[float, float, float]:
    points = ((0, 3), (300, 3), (1200, 45), (1500, 45), (2100, 5), (2700, 5))
    for (start, low), (end, high) in pairwise(points):
        if now < end:
            return low + (high - low) * (now - start) / (end - start), 1000, 300
    return 5, 1000, 300


def mix_trace(now: float) -> tuple[float, float, float]:
    return (12, 5000, 200) if 900 <= now < 1800 else (12, 1000, 300)


def day_trace(now: float) -> tuple[float, float, float]:
    """A day pressed into 45 minutes: a wave, and every seventh minute a burst of twice the load."""
    wave = 16 - 12 * math.cos(2 * math.pi * now / SECONDS)
    return wave * (2.0 if int(now / 60) % 7 == 0 else 1.0), 1000, 300


Trace = Callable[[float], tuple[float, float, float]]
TRACES: dict[str, Trace] = {
    "step": step_trace, "ramp": ramp_trace, "mix": mix_trace, "day": day_trace,
}  # fmt: skip


def requests(trace: Trace, seed: int) -> list[Request]:
    """All arrivals of a run."""
    draw = random.Random(seed)

    def length(mean: float, floor: int) -> int:
        return max(floor, int(draw.lognormvariate(math.log(mean) - 0.125, 0.5)))

    found, now = [], 0.0
    while True:
        now += draw.expovariate(trace(now)[0])
        if now >= SECONDS:
            return found
        _, prompt, output = trace(now)
        tokens = length(prompt, 16)
        found.append(Request(now, tokens, length(output, 8), tokens))


@dataclass
class Fleet:
    """What a rule sees."""

    now: float
    wanted: int
    replicas: list[Replica]

    @property
    def ready(self) -> list[Replica]:
        """Replicas that serve and stay."""
        return [r for r in self.replicas if not r.draining and r.ready_at <= self.now]


class Ours:
    """decide() as the operator calls it, with its defaults."""

    every = 2.0

    def __init__(self, window: float) -> None:
        self.history, self.window = History(), window
        self.last_shrink: float | None = None
        self.stored: float | None = None

    def __call__(self, fleet: Fleet) -> int:
        """The wanted size."""
        answers = {f"r{id(r)}": r.stats(fleet.now) for r in fleet.ready}
        self.history = self.history.add(fleet.now, answers)
        policy = Policy(
            current=fleet.wanted, minimum=MINIMUM, maximum=MAXIMUM, target=TARGET,
            ready=tuple(sorted(answers)), down_window=self.window, last_shrink=self.last_shrink,
            stored_capacity=self.stored,
        )  # fmt: skip
        found = decide(self.history, policy, fleet.now)
        self.stored = found.capacity_tokens_per_second or self.stored
        if found.desired < fleet.wanted:
            self.last_shrink = fleet.now
        return found.desired


class Stabilised:
    """HPA's default behaviour around a recommendation: up by max(2n, n + 4), down to the maximum
    recommendation of the last 300 s."""

    def __init__(self, every: float, recommend: Callable[[Fleet], int]) -> None:
        self.every, self.recommend = every, recommend
        self.past: deque[tuple[float, int]] = deque()

    def __call__(self, fleet: Fleet) -> int:
        """The wanted size."""
        wanted = min(self.recommend(fleet), max(2 * fleet.wanted, fleet.wanted + 4))
        self.past.append((fleet.now, wanted))
        while self.past[0][0] < fleet.now - 300:
            self.past.popleft()
        if wanted < fleet.wanted:
            wanted = min(fleet.wanted, max(size for _, size in self.past))
        return min(max(wanted, MINIMUM), MAXIMUM)


def keda_queue(fleet: Fleet) -> int:
    waiting = sum(len(replica.waiting) for replica in fleet.ready)
    if abs(waiting - 5 * fleet.wanted) <= 0.5 * fleet.wanted:
        return fleet.wanted
    return math.ceil(waiting / 5)


def hpa_kv(fleet: Fleet) -> int:
    """HPA on mean KV use with target 50 %; tolerance 10 %."""
    ready = fleet.ready
    ratio = sum(r.reserved / KV_TOKENS for r in ready) / max(1, len(ready)) / 0.5
    return fleet.wanted if abs(ratio - 1) <= 0.1 else math.ceil(len(ready) * ratio)


class Fixed:
    """Always six."""

    every = 60.0

    def __call__(self, fleet: Fleet) -> int:
        """The wanted size."""
        return 6


def simulate(
    rule: Callable[[Fleet], int], every: float, arrivals: list[Request], lead: float
) -> tuple[float, float]:
    """Share of requests that missed their objectives, and replica-hours paid.

    lead: seconds from the decision to a ready replica. Pending and draining replicas are paid.
    """
    fleet = Fleet(0.0, FIRST, [Replica(0.0) for _ in range(FIRST)])
    queue, paid = deque(arrivals), 0.0
    for tick in range(int(SECONDS / TICK)):
        fleet.now = now = tick * TICK
        if now % every == 0:
            fleet.wanted = rule(fleet)
            resize(fleet, lead)
        ready = fleet.ready
        while queue and queue[0].arrived < now + TICK:
            min(ready, key=lambda replica: replica.load).arrive(queue.popleft())
        for replica in fleet.replicas:
            if replica.ready_at <= now:
                replica.run(now + TICK)
        fleet.replicas = [r for r in fleet.replicas if not (r.draining and not r.load)]
        paid += TICK * len(fleet.replicas)
    ended = [one for one in arrivals if one.first < math.inf or one.arrived < SECONDS - TTFT]
    late = sum(1 for one in ended if one.first == math.inf)
    known = [one for one in ended if one.last < math.inf]
    missed = late + sum(not one.met() for one in known)
    return missed / max(1, late + len(known)), paid / 3600


def resize(fleet: Fleet, lead: float) -> None:
    """Order replicas, or let the pending ones and then the least loaded go; one always serves."""
    live = [r for r in fleet.replicas if not r.draining]
    for _ in range(fleet.wanted - len(live)):
        fleet.replicas.append(Replica(fleet.now + lead))
    victims = sorted(live, key=lambda r: (r.ready_at <= fleet.now, r.load))
    for replica in victims[: max(0, len(live) - fleet.wanted)]:
        if replica.ready_at > fleet.now:
            fleet.replicas.remove(replica)
        elif len(fleet.ready) > 1:
            replica.draining = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--traces", nargs="+", choices=sorted(TRACES), default=list(TRACES))
    parser.add_argument("--lead", nargs="+", type=float, default=[118.0, 20.0],
                        help="seconds from a decision to a ready replica")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="runs of each cell; means are shown")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    peers: dict[str, Callable[[], Stabilised | Fixed]] = {
        "KEDA queue rule": lambda: Stabilised(30.0, keda_queue),
        "HPA rule on KV use": lambda: Stabilised(15.0, hpa_kv),
        "static 6": Fixed,
    }
    for name in arguments.traces:
        for lead in arguments.lead:
            window = min(300.0, max(60.0, lead))
            ours = cell(lambda window=window: Ours(window), name, lead, arguments.seeds)
            for peer, make in peers.items():
                theirs = cell(make, name, lead, arguments.seeds)
                print(json.dumps(line(name, lead, ours, peer, theirs, commit)), flush=True)


def cell(
    make: Callable[[], Ours | Stabilised | Fixed], name: str, lead: float, seeds: int
) -> tuple[float, float]:
    """Means over the seeds of missed share and replica-hours."""
    runs = []
    for seed in range(1, seeds + 1):
        rule = make()
        runs.append(simulate(rule, rule.every, requests(TRACES[name], seed), lead))
    return sum(r[0] for r in runs) / seeds, sum(r[1] for r in runs) / seeds


def line(
    name: str, lead: float, ours: tuple[float, float], peer: str, theirs: tuple[float, float],
    commit: str,
) -> dict[str, object]:  # fmt: skip
    """One JSON line: value is the share of missed requests times replica-hours, less is better."""
    value, peer_value = ours[0] * ours[1], theirs[0] * theirs[1]
    return {
        "bench": "autoscale",
        "case": f"{name}, lead {lead:g} s",
        "value": round(value, 4),
        "unit": "missed share × replica-hours",
        "peer": peer,
        "peer_value": round(peer_value, 4),
        "ratio": round(value / peer_value, 3) if peer_value else None,
        "device": "simulation",
        "commit": commit,
        "missed": round(ours[0], 4),
        "replica_hours": round(ours[1], 2),
        "peer_missed": round(theirs[0], 4),
        "peer_replica_hours": round(theirs[1], 2),
    }


if __name__ == "__main__":
    main()
