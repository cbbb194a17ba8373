"""Progress lines on stderr, each with the seconds since the command began."""

import sys
import time


class Progress:
    """Prints one line per step; stdout stays free for what a command returns."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print one line with the elapsed time before it."""
        print(f"[cluster {clock(self.elapsed_seconds())}] {text}", file=sys.stderr, flush=True)

    def elapsed_seconds(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._began


def clock(seconds: float) -> str:
    """Seconds as `m:ss`, the way a stopwatch shows them."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
