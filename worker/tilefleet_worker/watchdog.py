"""Tells a stall from load: work is queued, yet no step finishes."""

from dataclasses import dataclass

# A step may be slow for good reasons (a large model on two cores). Only a multiple of what steps
# took so far counts as a stall, so that load alone never restarts a worker.
SLOW_STEP_FACTOR = 10.0


@dataclass(frozen=True, slots=True)
class Watchdog:
    """Judges progress from times that the caller measured; holds no clock and no state."""

    stall_seconds: float

    def stall(self, seconds_without_progress: float, slowest_step_seconds: float) -> str | None:
        """Return why the engine counts as stalled, or None.

        seconds_without_progress: since the last finished step or, if later, since work arrived;
        0 when idle. slowest_step_seconds: the longest recent step.
        """
        limit = max(self.stall_seconds, SLOW_STEP_FACTOR * slowest_step_seconds)
        if seconds_without_progress <= limit:
            return None
        return (
            f"work is queued but no step finished for {seconds_without_progress:.1f} s "
            f"(limit {limit:.1f} s, slowest recent step {slowest_step_seconds:.3f} s)"
        )
