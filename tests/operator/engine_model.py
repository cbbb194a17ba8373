"""A small queueing model of replicas under load, to drive decide() through time.

Each replica runs at most `slots` requests; every running request gets `rate` tokens per second, so
that one replica can do slots × rate. Requests go to the replica with the fewest.
"""

from dataclasses import dataclass, field

from tests.operator.builders import NOW, stats
from tilefleet_operator.autoscale import Decision, Policy, decide
from tilefleet_operator.observed import History, WorkerStats

PROMPT, OUTPUT = 20, 40


@dataclass
class Replica:
    """Requests as tokens left; totals as the worker counts them."""

    slots: int
    rate: float
    ready_at: float
    work: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    arrivals: int = 0
    completions: int = 0
    generated: float = 0.0
    computed: int = 0

    def arrive(self, now: float) -> None:
        self.arrivals += 1
        self.work.append(float(OUTPUT))
        self.waits.append(now)

    def run(self, seconds: float) -> None:
        for index in range(min(self.slots, len(self.work))):
            if self.work[index] == OUTPUT:
                self.computed += PROMPT
            done = min(self.work[index], self.rate * seconds)
            self.work[index] -= done
            self.generated += done
        kept = [i for i, left in enumerate(self.work) if left > 0]
        self.completions += len(self.work) - len(kept)
        self.work = [self.work[i] for i in kept]
        self.waits = [self.waits[i] for i in kept]

    def answer(self, now: float) -> WorkerStats:
        waiting = max(0, len(self.work) - self.slots)
        return stats(
            arrivals=self.arrivals,
            completions=self.completions,
            generated_tokens=int(self.generated),
            prompt_tokens_computed=self.computed,
            running=len(self.work) - waiting,
            waiting=waiting,
            oldest_wait_seconds=now - self.waits[self.slots] if waiting else 0.0,
            max_concurrent=self.slots,
            uptime_seconds=max(0.0, now - self.ready_at),
        )


def run(
    arrivals_per_second: list[tuple[float, float]],
    policy: Policy,
    *,
    seconds: float,
    slots: int = 4,
    rate: float = 10.0,
    start_seconds: float = 5.0,
    silent: tuple[float, float] = (0.0, 0.0),
) -> list[tuple[float, Decision]]:
    """Decisions every 2 s. arrivals_per_second: (until second, rate) pieces, evenly spaced.

    silent: from and to second in which no replica answers.
    """
    replicas = [Replica(slots, rate, -100.0) for _ in range(policy.current)]
    history, log, due = History(), [], 0.0
    wanted, last_shrink, capacity = policy.current, None, policy.stored_capacity
    for tick in range(int(seconds * 4)):
        now = tick / 4
        ready = [r for r in replicas if r.ready_at <= now]
        demand = next((r for until, r in arrivals_per_second if now < until), 0.0)
        due += demand / 4
        while due >= 1:
            min(ready, key=lambda r: len(r.work)).arrive(now)
            due -= 1
        for replica in ready:
            replica.run(0.25)
        if tick % 8:
            continue
        heard = not silent[0] <= now < silent[1]
        answers = {f"r{i}": r.answer(now) for i, r in enumerate(replicas) if r.ready_at <= now}
        history = history.add(NOW + now, answers if heard else {})
        decision = decide(
            history,
            Policy(
                **{
                    **policy.__dict__,
                    "current": wanted,
                    "ready": tuple(sorted(answers)),
                    "last_shrink": last_shrink,
                    "stored_capacity": capacity,
                }
            ),
            NOW + now,
        )
        log.append((now, decision))
        capacity = decision.capacity_tokens_per_second or capacity
        if decision.desired < wanted:
            last_shrink = NOW + now
            replicas = replicas[: decision.desired]
        for _ in range(decision.desired - len(replicas)):
            replicas.append(Replica(slots, rate, now + start_seconds))
        wanted = decision.desired
    return log
