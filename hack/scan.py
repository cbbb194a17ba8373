"""Judges the rendered chart by checkov's policies; every finding is fixed, or waived here.

checkov pins many packages of its own, so it lives in an environment of its own (locks/scan.txt).
Fails on a finding without a waiver, and on a waiver without a finding.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import helm_python as helm

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "locks" / "scan.txt"
ENVIRONMENT = ROOT / "build" / "scan"
OPERATOR, TEST = "Deployment.tilefleet-operator", "Pod.tilefleet-test"
NO_LIMIT = "a CPU limit throttles in slices of 100 ms; the request reserves what is needed"
TAGGED = "a digest belongs to a release, not to the sources; image.*.digest wins over the tag"
PULLED = "tags are never moved, and Always keeps a node from starting pods when its registry is out"
TALKS = "it talks to the API server, with the roles in docs/reference/rights.md"
SHORT = "a helm test hook: it runs for a minute to its end, then is deleted"
# (check, kind.name) → why it stands.
WAIVED: dict[tuple[str, str], str] = {
    ("CKV_K8S_11", OPERATOR): NO_LIMIT,
    ("CKV_K8S_15", OPERATOR): PULLED,
    ("CKV_K8S_38", OPERATOR): TALKS,
    ("CKV_K8S_43", OPERATOR): TAGGED,
    ("CKV_K8S_8", TEST): SHORT,
    ("CKV_K8S_9", TEST): SHORT,
    ("CKV_K8S_11", TEST): NO_LIMIT,
    ("CKV_K8S_15", TEST): PULLED,
    ("CKV_K8S_38", TEST): TALKS,
    ("CKV_K8S_43", TEST): TAGGED,
    ("CKV2_K8S_6", TEST): SHORT,
}


def main() -> int:
    """Print the verdict; 1 when a finding or a waiver is left over."""
    install()
    with tempfile.TemporaryDirectory() as folder:
        render(Path(folder))
        report = scan(Path(folder))
    failed = {finding(one): one["check_name"] for one in report["results"]["failed_checks"]}
    wrong = [f"{check} {what}: {failed[check, what]}" for check, what in failed.keys() - WAIVED]
    wrong += [f"{check} {what}: waived, but not found" for check, what in WAIVED.keys() - failed]
    summary = report["summary"]
    print(
        f"checkov: {summary['passed']} passed, {len(failed)} waived with a reason in hack/scan.py"
    )
    print("\n".join(sorted(wrong)), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong or not summary["passed"] or summary["parsing_errors"] else 0


def install() -> None:
    """The environment as locked; nothing to do when it is."""
    stamp = ENVIRONMENT / "lock.txt"
    if stamp.exists() and stamp.read_bytes() == LOCK.read_bytes():
        return
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tilefleet" / "uv"
    uv = shutil.which("uv") or str(home / "bin" / "uv")  # where hack/uv.sh puts it
    python = str(ENVIRONMENT / "bin" / "python")
    subprocess.run([uv, "venv", "--quiet", "--clear", str(ENVIRONMENT)], check=True)
    sync = ["pip", "sync", "--quiet", "--require-hashes", "--python", python, str(LOCK)]
    subprocess.run([uv, *sync], check=True)
    shutil.copy(LOCK, stamp)


def render(folder: Path) -> None:
    """The chart's objects with default values, but for the CRDs, one file a template."""
    with helm.Chart.load(str(ROOT / "helm" / "tilefleet")) as chart:
        texts = chart.render({}, name="tilefleet", namespace="tilefleet-system")
    for path, text in texts.items():
        if path.endswith(".yaml") and not path.endswith("/crds.yaml") and text.strip():
            (folder / path.replace("/", "_")).write_text(text)


def scan(folder: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """checkov's report. It exits with 1 when a check fails, which is no error of ours."""
    command = [str(ENVIRONMENT / "bin" / "checkov"), "-d", str(folder), "-o", "json"]
    command += ["--framework", "kubernetes", "--quiet", "--skip-download"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        raise SystemExit(f"checkov said nothing; its errors: {done.stderr[-2000:]}")
    report: dict[str, dict[str, list[dict[str, str]]]] = json.loads(done.stdout)
    return report


def finding(one: dict[str, str]) -> tuple[str, str]:
    """Check id, and kind.name without the namespace."""
    kind, *_, name = one["resource"].split(".")
    return one["check_id"], f"{kind}.{name}"


if __name__ == "__main__":
    sys.exit(main())
