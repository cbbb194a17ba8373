"""Whose turn it is: priority first, then a fair share of tokens between tenants, then arrival.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) with tokens as the cost, as the virtual token
counter for LLM serving (Sheng et al., OSDI 2024) counts them: each request starts where its
tenant's last one ends, in virtual time, which is that of the request admitted last. A tenant that
was idle starts now and gains no credit. With one tenant it is first come, first served.
"""

from typing import NamedTuple

from tilefleet_worker.request import Request

# Tenants whose tags are remembered; those in the past are dropped first, and lose nothing by it.
MAX_TENANTS = 4096


class Turn(NamedTuple):
    """A request's place, decided once when it comes: the smaller is served first."""

    priority: int
    start: float
    """Virtual time, in tokens of one tenant."""
    arrival: int


class FairOrder:
    """Hands out turns. Knows no queue."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}
        # tenant → arrival → start of requests that were not admitted yet, in order of both
        self._waiting: dict[str, dict[int, float]] = {}
        self._arrivals = 0

    def turn(self, request: Request) -> Turn:
        """The place of a request that comes now. It is charged all tokens that it may take.

        Never before one of the same tenant that still waits: what answers that ended early gave
        back to the tenant serves those who come later.
        """
        start = max(self._now, self._ends.get(request.tenant, 0.0))
        self._ends[request.tenant] = start + request.max_total_tokens
        waiting = self._waiting.setdefault(request.tenant, {})
        if waiting:
            start = max(start, next(reversed(waiting.values())))
        self._arrivals += 1
        waiting[self._arrivals] = start
        if len(self._ends) > MAX_TENANTS:
            self._forget()
        return Turn(request.priority, start, self._arrivals)

    def admitted(self, request: Request, turn: Turn) -> None:
        """A request begins to be served, or does so again: virtual time is at least its start."""
        self._now = max(self._now, turn.start)
        self._stop_waiting(request, turn)

    def settle(self, request: Request, turn: Turn, num_tokens: int) -> None:
        """A request ended with `num_tokens` tokens of prompt and answer: its tenant gets the rest.

        Requests of the tenant that wait already keep their turns.
        """
        if request.tenant in self._ends:
            self._ends[request.tenant] -= request.max_total_tokens - num_tokens
        self._stop_waiting(request, turn)

    def _stop_waiting(self, request: Request, turn: Turn) -> None:
        waiting = self._waiting.get(request.tenant)
        if waiting is not None:
            waiting.pop(turn.arrival, None)
            if not waiting:
                del self._waiting[request.tenant]

    def _forget(self) -> None:
        """Drop tenants whose next request would start now in any case; else the least burdened."""
        self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._now}
        for tenant in sorted(self._ends, key=self._ends.__getitem__)[: -MAX_TENANTS // 2]:
            del self._ends[tenant]
