"""What keeps a pod from serving, in words with the remedy, and how long its place stays empty.

A pod carries the count of its predecessors' failures and the nodes where they failed as
annotations, so that back-off outlives the operator, and deleting the pod by hand ends it.
Does not know which pods exist beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tilefleet_operator.observed import PodView
from tilefleet_operator.reasons import DegradedReason

IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
# One restart may be a bad moment of the node; the third is a pattern.
CRASH_RESTARTS = 3
# A pod that the kubelet refuses fails at once; replacing it faster would only fill the API server.
FAILED_BACKOFF_SECONDS, FAILED_BACKOFF_MOST_SECONDS = 10.0, 300.0
# What lived longer than the longest back-off did not fail for the reason of its predecessor.
FORGIVEN_SECONDS = 2 * FAILED_BACKOFF_MOST_SECONDS
# Three crashes take about a minute under the kubelet's own back-off.
MOVE_SECONDS, MOVE_MOST_SECONDS = 60.0, 3600.0
AVOIDED_NODES = 8
_MODEL, _CONFIG = "ModelError: ", "ConfigError: "
_LAST_WORDS = re.compile(r"[A-Za-z]{1,64}: \S")
_TEXT_CHARACTERS = 500


@dataclass(frozen=True)
class Failure:
    """reason: of the condition Degraded. message: names the pod, what is wrong and what helps."""

    reason: DegradedReason
    message: str


@dataclass(frozen=True)
class Successor:
    """What a replacement takes over. attempt: failures before it. avoid: nodes, newest last."""

    attempt: int = 0
    avoid: tuple[str, ...] = ()


def failure(pod: PodView) -> Failure | None:
    """Why a pod does not serve, None while it serves or may merely need more time."""
    if pod.ready:
        return None
    name = f"pod {pod.name}"
    if pod.finished:
        what = ": ".join(part for part in (pod.reason, pod.message) if part) or pod.phase
        return Failure("PodFailed", f"{name} failed: {what[:_TEXT_CHARACTERS]}")
    if pod.reason in IMAGE_REASONS:
        # The kubelet alternates between two reasons; one text keeps the status still.
        remedy = "check spec.engine.image, and that the nodes reach its registry and may pull"
        return Failure("ImagePull", f"{name} cannot pull its image {pod.image}; {remedy}")
    if pod.reason in CONFIG_REASONS:
        said = f"{pod.reason}: {pod.message[:_TEXT_CHARACTERS]}"
        return Failure("ContainerConfig", f"{name}: {said}; create what it names or correct spec")
    return _ended(pod, name)


def _ended(pod: PodView, name: str) -> Failure | None:
    """The failure of a container that ended, from its exit and its last words."""
    crashing = pod.reason == "CrashLoopBackOff" or pod.restarts >= CRASH_RESTARTS
    ended = pod.last_exit
    logs = f"see kubectl logs {pod.name} --previous"
    if ended is None:
        return Failure("CrashLoop", f"{name} crashed; {logs}") if crashing else None
    words = " ".join(ended.message.split())[:_TEXT_CHARACTERS]
    if ended.reason == "OOMKilled":
        remedy = "raise spec.engine.resources.memory, or lower spec.engine.kvCache.memory"
        return Failure("OutOfMemory", f"{name} needed more memory than its limit; {remedy}")
    if words.startswith(_MODEL):
        said = words.removeprefix(_MODEL)
        return Failure("ModelUnavailable", f"{name}: {said}; correct spec.model or the source")
    if words.startswith(_CONFIG):
        said = words.removeprefix(_CONFIG)
        return Failure("InvalidConfiguration", f"{name}: {said}; correct spec.engine")
    if not crashing:
        return None
    # Log lines carry times; repeating them would rewrite the status at every crash.
    told = f" ({words})" if _LAST_WORDS.match(words) else ""
    return Failure("CrashLoop", f"{name} crashed with exit code {ended.code}{told}; {logs}")


def failed_backoff(pod: PodView, now: float) -> float:
    """Seconds until a finished pod may be replaced; at most 0 when it may."""
    delay = min(FAILED_BACKOFF_SECONDS * 2.0**pod.attempt, FAILED_BACKOFF_MOST_SECONDS)
    return pod.created + delay - now


def move_backoff(pod: PodView, now: float) -> float | None:
    """Seconds until a pod that crashes where it is may try another node; None if it does not.

    The kubelet restarts it in place meanwhile, with a back-off of its own; without that back-off
    the restarts lie back.
    """
    looping = pod.reason == "CrashLoopBackOff" and pod.restarts >= CRASH_RESTARTS
    if pod.ready or pod.node is None or not looping:
        return None
    delay = min(MOVE_SECONDS * 2.0**pod.attempt, MOVE_MOST_SECONDS)
    return pod.created + delay - now


def successor(pod: PodView, now: float) -> Successor:
    """What the replacement of a failed pod knows of it."""
    if now - pod.created > FORGIVEN_SECONDS and pod.finished:
        return Successor()
    nodes = (*(node for node in pod.avoid if node != pod.node), pod.node)
    avoid = tuple(node for node in nodes if node is not None)
    return Successor(pod.attempt + 1, avoid[-AVOIDED_NODES:])
