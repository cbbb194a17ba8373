"""One step of a fleet whose rollout has stopped: what served goes on serving.

    serving = ready pods of the new revision + pods of the former one   >= wanted - maxUnavailable
    total   = active pods                                               <= wanted + maxSurge

What is lost of the former revision comes back as such; new pods that are not ready make room for
it, but one stays, to show what is wrong and to succeed after all. Does not know when a rollout
counts as stopped, nor how a pod of a former revision is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefleet_operator.failures import Successor, successor
from tilefleet_operator.fleet import Fleet
from tilefleet_operator.moves import Moves, Removal, failed_pods, given_up, moved_pods
from tilefleet_operator.observed import PodView, Snapshot
from tilefleet_operator.victims import order_victims

_WHY = "the rollout stopped; {} of {} replicas serve"


def standstill(fleet: Fleet, wanted: int, snapshot: Snapshot, now: float, former: str) -> Moves:
    """The step. former: the revision that was everywhere before."""
    rollout = snapshot.deployment.spec.rollout
    failed, held, failed_wait = failed_pods(fleet, now, (fleet.revision, former))
    moved, move_wait = moved_pods(fleet, now)
    stale = [pod for pod in fleet.old if not pod.ready and pod.revision != former]
    old = [pod for pod in fleet.old if pod not in stale]
    trials = [pod for pod in fleet.new if all(pod is not r.pod for r in moved)]
    serving = sum(pod.ready for pod in trials) + len(old)
    room = wanted + rollout.max_surge - len(trials) - len(old) - held.total()
    missing = max(0, wanted - rollout.max_unavailable - serving - held[former])
    leaving = _surplus(old, serving - wanted, len(fleet.ready) - wanted, snapshot)
    leaving += _squeezed(trials, max(missing - room, len(trials) - wanted), wanted, snapshot)
    restored = min(missing, max(0, room + len(leaving)))
    tried = min(max(1, len(fleet.new)), wanted) - len(trials) - held[fleet.revision]
    tried = 0 if leaving else max(0, min(tried, room - restored))
    waits = (failed_wait, move_wait, fleet.wait_seconds)
    return Moves(
        removals=(
            *(Removal(p, drain=False, why=f"revision {p.revision} is outdated") for p in stale),
            *(*leaving, *moved, *failed, *given_up(fleet, wanted)),
        ),
        additions=_heirs([*failed, *moved], fleet.revision, tried, now),
        why_add=_WHY.format(serving, wanted) + ", and one goes on trying the new revision",
        wait_seconds=min((wait for wait in waits if wait is not None), default=None),
        restorations=_heirs(failed, former, restored, now),
        why_restore=_WHY.format(serving, wanted) + "; the former revision fills up",
    )


def _surplus(pods: Sequence[PodView], count: int, spare: int, snapshot: Snapshot) -> list[Removal]:
    """Old pods above what is wanted; of those that serve at most `spare`."""
    removals: list[Removal] = []
    for pod, reason in order_victims(pods, snapshot):
        if len(removals) >= count:
            break
        if pod.ready and spare <= 0:
            continue
        spare -= pod.ready
        removals.append(Removal(pod, pod.ready, f"more replicas serve than wanted; {reason}"))
    return removals


def _squeezed(
    trials: Sequence[PodView], count: int, wanted: int, snapshot: Snapshot
) -> list[Removal]:
    """New pods that never became ready and stand in the way; one stays while any is wanted."""
    most = len(trials) - min(1, wanted)
    chosen = [one for one in order_victims(trials, snapshot) if not one[0].ready]
    why = "the rollout stopped, and what serves needs the place; {}"
    return [
        Removal(pod, False, why.format(said)) for pod, said in chosen[: max(0, min(count, most))]
    ]


def _heirs(
    removals: Sequence[Removal], revision: str, count: int, now: float
) -> tuple[Successor, ...]:
    heirs = [successor(r.pod, now) for r in removals if r.pod.revision == revision]
    return tuple([*heirs, *[Successor()] * count][:count])
