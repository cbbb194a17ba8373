"""What the demo prints: stages with their times, the cluster's own tables, the sum at the end."""

import contextlib
import time
from collections.abc import Iterator

from testbed import Json, Testbed, condition


class Report:
    """Remembers how long each stage took; every line carries the seconds since the start."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.stages: list[tuple[str, float]] = []

    def say(self, text: str) -> None:
        """One or more lines, each with the time."""
        for line in text.splitlines():
            print(f"[{clock(time.monotonic() - self.began)}] {line}", flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, why: str) -> Iterator[None]:
        """Announces a stage and keeps its duration, also when it fails."""
        print(flush=True)
        self.say(f"==> {name}: {why}")
        started = time.monotonic()
        try:
            yield
        finally:
            self.stages.append((name, time.monotonic() - started))

    def where_the_time_went(self) -> None:
        """A bar for each stage."""
        total = sum(seconds for _, seconds in self.stages) or 1.0
        print("\nwhere the time went", flush=True)
        for name, seconds in self.stages:
            bar = "#" * round(40 * seconds / total)
            print(f"  {name:<22} {seconds:7.1f} s  {bar}", flush=True)
        print(f"  {'all':<22} {total:7.1f} s", flush=True)


class FleetWatch:
    """Prints `kubectl get infd` rows when they change, as `kubectl get infd -w` would."""

    def __init__(self, bed: Testbed, report: Report, namespace: str = "default") -> None:
        self.bed, self.report, self.namespace = bed, report, namespace
        self.versions: dict[str, str | None] = {}
        self.last: dict[str, str] = {}

    def table(self) -> None:
        """The whole table, and the pods below it."""
        for kind in ("infd", "pods"):
            rows = self.bed.kubectl("-n", self.namespace, "get", kind)
            self.report.say(rows.rstrip())

    def look(self, fleet: str) -> Json | None:
        """The fleet as it is now; its row and its reason are printed when they differ."""
        found = self.bed.get("infd", fleet, self.namespace)
        version = (found or {}).get("metadata", {}).get("resourceVersion")
        if found is None or version == self.versions.get(fleet):
            return found
        self.versions[fleet] = version
        row = self.bed.kubectl("-n", self.namespace, "get", "infd", fleet, "--no-headers").strip()
        message = condition(found, "Ready").get("message", "not seen by the operator yet")
        seen = f"{without_age(row)} | {message}"
        if seen != self.last.get(fleet):
            self.last[fleet] = seen
            self.report.say(f"{row}  | {message}")
        return found


def without_age(row: str) -> str:
    """A row of kubectl's without its last column, which always changes."""
    return " ".join(row.split()[:-1])


def clock(seconds: float) -> str:
    """Seconds as m:ss.d."""
    return f"{int(seconds) // 60}:{seconds % 60:04.1f}"
