"""From `kubectl apply` to the pod, on the local cluster, by the API server's own clock.

    make bench-operator-latency, or, from the root: .venv/bin/python benchmarks/operator_latency.py

Two cases: fleets created one after another, and all at once. The time of a fleet is from the audit
log's answer to the create of the InferenceDeployment to its answer to the create of the pod, so
that no client's start-up is in it. Pods go to fake MI300X nodes: no image is pulled, no model
loaded. One JSON line for each case. Not called operator.py: that name would hide the standard
library's `operator` from every program in this folder.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "hack" / "testbed"), str(ROOT / "tests" / "e2e")]

from fleets import amd_fleet  # noqa: E402
from start import started  # noqa: E402
from testbed import Testbed, until  # noqa: E402

NAMESPACE = "bench-operator"
Json = dict[str, Any]


def answered(event: Json) -> float:
    """Seconds since the epoch at which the API server answered, to the microsecond."""
    return datetime.fromisoformat(event["stageTimestamp"]).timestamp()


def percentile(values: list[float], share: float) -> float:
    """Nearest-rank percentile; share 0..1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def latencies(bed: Testbed, position: int, names: list[str]) -> list[float] | None:
    """Seconds from fleet to pod of each named fleet; None while a pod is missing."""
    fleets: dict[str, float] = {}
    pods: dict[str, float] = {}
    for event in bed.audit_events(position):
        reference = event["objectRef"]
        if event.get("responseStatus", {}).get("code") != 201:
            continue
        if reference.get("namespace") != NAMESPACE or reference.get("subresource"):
            continue
        name = reference.get("name", "")
        if reference["resource"] == "inferencedeployments":
            fleets[name] = answered(event)
        elif reference["resource"] == "pods":
            pods.setdefault(name.rsplit("-", 2)[0], answered(event))
    if not set(names) <= set(pods):
        return None
    return [pods[name] - fleets[name] for name in names]


def measure(bed: Testbed, case: str, count: int, pause_seconds: float) -> Json:
    """Creates `count` fleets of one replica and returns the row of this case."""
    position = bed.audit_position()
    names = [f"{case}-{number}" for number in range(count)]
    objects = [amd_fleet(name, NAMESPACE, replicas=1, count=1) for name in names]
    if pause_seconds:
        for obj in objects:
            bed.apply(obj)
            time.sleep(pause_seconds)
    else:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        bed.kubectl("apply", "-f", "-", stdin=text, seconds=300)

    def look() -> tuple[list[float] | None, str]:
        return latencies(bed, position, names), "pods are missing"

    seconds = until(f"{count} pods", look, 120)
    bed.kubectl("-n", NAMESPACE, "delete", "infd", "--all", "--wait=true", seconds=300)
    return {
        "benchmark": "operator",
        "case": case,
        "fleets": count,
        "p50_seconds": round(percentile(seconds, 0.50), 4),
        "p99_seconds": round(percentile(seconds, 0.99), 4),
        "max_seconds": round(max(seconds), 4),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def cpu_name() -> str:
    """Model name of the first processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """Short hash of the sources, with a mark when they differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleets", type=int, default=60, help="fleets of each case")
    arguments = parser.parse_args()
    with started(keep=False) as bed:
        bed.install()
        bed.add_fake_nodes(-(-arguments.fleets // 8))
        bed.kubectl("create", "namespace", NAMESPACE)
        for case, pause_seconds in (("one-by-one", 0.2), ("all-at-once", 0.0)):
            print(json.dumps(measure(bed, case, arguments.fleets, pause_seconds)), flush=True)
        bed.kubectl("delete", "namespace", NAMESPACE, "--wait=true", seconds=120)
        bed.remove_fake_nodes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
