"""What the cases of a sweep came to: kept in a file as they end, counted at the end.

The file has one JSON object a line, so that a sweep which was stopped goes on where it was. Results
of other code stay in it and count for nothing.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.life import STAGES, Problem
from tests.operator.apiserver import ROOT

Json = dict[str, Any]
KINDS = {
    "state": "a stage that did not end as undisturbed",
    "made": "more or fewer pods made than undisturbed",
    "twice": "a pod made twice",
    "down": "more than maxUnavailable down",
    "surplus": "more than maxSurge above",
    "non-leader": "a write by a process without the Lease",
    "impatient": "a write repeated before its Retry-After",
    "process": "an operator that ended, or did not end, as it must",
}


@dataclass(frozen=True, order=True)
class Point:
    """When a fault comes: at the n-th write of a stage, from 1; or, at 0, when the stage begins."""

    stage: str
    number: int

    def __str__(self) -> str:
        return f"{self.stage}:{self.number}"


Case = tuple[str, Point]
"""A fault and when it comes."""


@dataclass
class Verdict:
    """How one life went."""

    fault: str
    at: Point
    reached: bool = False
    """Whether the fault came: a life may have fewer writes in a stage."""
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0
    looks: int = 0
    pods: int = 0
    writes: int = 0

    @property
    def where(self) -> str:
        """The case in words."""
        return f"{self.fault} at {self.at}{'' if self.reached else ' (not reached)'}"


class Results:
    """All verdicts of one sweep over one version of the code."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.code = file, fingerprint()
        self.logs = None if file is None else file.with_suffix(".logs")
        """Where operators write; None: nowhere that is kept."""
        if self.logs is not None:
            self.logs.mkdir(exist_ok=True)
        self.verdicts: list[Verdict] = []
        self.num_writes: dict[str, int] = {}
        """Writes in each stage of the undisturbed life that the sweep began with."""
        self.total = 0
        self._begun, self._resumed = time.monotonic(), 0
        text = file.read_text() if file is not None and file.exists() else ""
        for line in text.splitlines():
            self._recall(line)
        if file is not None and text and not text.endswith("\n"):
            file.write_text(text + "\n")  # it was stopped while it wrote

    def _recall(self, line: str) -> None:
        try:
            said = json.loads(line)
        except ValueError:
            return
        if said.pop("code") != self.code:
            return
        if "num_writes" in said:
            self.num_writes = said["num_writes"]
        else:
            said["at"] = Point(**said["at"])
            said["problems"] = [Problem(**one) for one in said["problems"]]
            self.verdicts.append(Verdict(**said))

    def begin(self, num_writes: dict[str, int]) -> None:
        """Fix the writes at which faults come, unless a sweep that is continued has done so."""
        if not self.num_writes:
            self.num_writes = num_writes
            self._keep({"num_writes": num_writes})

    def start(self, num_missing: int) -> None:
        """From here the time is counted that the rest is estimated by."""
        self.total = len(self.verdicts) + num_missing
        self._begun, self._resumed = time.monotonic(), len(self.verdicts)

    def missing(self, cases: Iterable[Case]) -> list[Case]:
        """The cases that have no verdict yet."""
        done = {(one.fault, one.at) for one in self.verdicts}
        return [case for case in cases if case not in done]

    def take(self, verdict: Verdict) -> None:
        """Keep a verdict, and say it with the counts so far."""
        self.verdicts.append(verdict)
        self._keep(asdict(verdict))
        failed = sum(bool(one.problems) for one in self.verdicts)
        fresh, spent = len(self.verdicts) - self._resumed, time.monotonic() - self._begun
        left = max(0, self.total - len(self.verdicts)) * spent / fresh / 60
        outcome = f"{len(verdict.problems)} problems" if verdict.problems else "equal"
        say(
            f"[{len(self.verdicts)}/{self.total}, {failed} failed, {left:.0f} min left]"
            f" {verdict.where}: {outcome} in {verdict.seconds:.0f} s"
        )
        for problem in verdict.problems:
            print(f"BROKEN {verdict.where}: {problem.kind}: {problem.text}", flush=True)

    def _keep(self, what: Json) -> None:
        if self.file is not None:
            with self.file.open("a") as opened:
                opened.write(json.dumps({"code": self.code, **what}) + "\n")

    def table(self, faults: Sequence[str]) -> str:
        """fault × stage: passed/total of the cases in which the fault came."""
        columns = ("all", *STAGES, "not reached")
        lines = [f"{'fault':20}" + "".join(f"{name:>12}" for name in columns)]
        names = [*faults, *sorted({one.fault for one in self.verdicts} - set(faults))]
        rows = {name: [one for one in self.verdicts if one.fault == name] for name in names}
        for fault, row in [*rows.items(), ("all", self.verdicts)]:
            reached = [one for one in row if one.reached]
            cells = [_passed(reached)]
            cells += [_passed(one for one in reached if one.at.stage == stage) for stage in STAGES]
            cells.append(str(len(row) - len(reached) or "-"))
            lines.append(f"{fault:20}" + "".join(f"{cell:>12}" for cell in cells))
        broken = Counter(problem.kind for one in self.verdicts for problem in one.problems)
        lines += [f"{broken[kind]:6} × {text}" for kind, text in KINDS.items()]
        return "\n".join(lines)

    def figures(self) -> Json:
        """Counts of cases, of what was looked at, and of what was broken."""
        reached = [one for one in self.verdicts if one.reached]
        broken = Counter(problem.kind for one in self.verdicts for problem in one.problems)
        return {
            "bench": "faults",
            "code": self.code,
            "cases": len(self.verdicts),
            "reached": len(reached),
            "passed": sum(not one.problems for one in reached),
            "broken": {kind: broken[kind] for kind in KINDS},
            "looks_at_pods": sum(one.looks for one in self.verdicts),
            "pods_made": sum(one.pods for one in self.verdicts),
            "writes_judged": sum(one.writes for one in self.verdicts),
        }


def whole(figures: Json) -> bool:
    """Whether nothing was broken in any case."""
    return figures["cases"] > 0 and not any(figures["broken"].values())


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def fingerprint() -> str:
    """Of everything that a verdict depends on: the operator, the CRD and the sweep itself."""
    digest = hashlib.sha256()
    folders = ("operator/tilefleet_operator", "crds", "tests/faults")
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".yaml", ".c"):
                digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _passed(verdicts: Iterable[Verdict]) -> str:
    found = [not one.problems for one in verdicts]
    return f"{sum(found)}/{len(found)}" if found else "-"
