"""make demo: from nothing to streamed tokens and a fleet that follows its load, then nothing again.

KEEP=1 leaves the cluster running. KUBECONFIG=FILE or CLUSTER=kind uses that cluster instead of the
local one. Ctrl-C at any time takes everything down.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "testbed"))

from report import FleetWatch, Report  # noqa: E402
from start import started  # noqa: E402
from testbed import NAMESPACE, OPERATOR, Json, Testbed, TestbedError, until  # noqa: E402

CLIENT = str(HERE / "client.py")
FLEET = "tiny"
LOAD_SECONDS = 150
QUESTION = "What does a library function do?"


def main() -> int:
    """0 when every stage did what it should; 1 with the next step; 130 after Ctrl-C."""
    report = Report()
    keep = os.environ.get("KEEP") == "1"
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with started(keep=keep, stage=report.stage) as bed:
            try:
                run_stages(bed, report)
            except TestbedError as error:
                report.say(f"FAILED: {error}")
                print(bed.diagnosis(), flush=True)
                raise
            if keep:
                print_how_to_go_on(bed)
    except TestbedError as error:
        print(f"\ndemo: {error}\nnext: KEEP=1 make demo, then look at the cluster it leaves")
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped; everything it started is gone", flush=True)
        return 130
    report.where_the_time_went()
    return 0


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the demo as Ctrl-C does."""
    raise KeyboardInterrupt


def run_stages(bed: Testbed, report: Report) -> None:
    """The story, in order; raises TestbedError where it stops."""
    watch = FleetWatch(bed, report)
    with report.stage("helm install", f"the chart with the CRD and two operators in {NAMESPACE}"):
        bed.install()
        report.say(bed.kubectl("-n", NAMESPACE, "get", f"deployment/{OPERATOR}").rstrip())
    with report.stage("fleet Ready", "kubectl apply -f examples/"):
        if bed.is_local:
            report.say(f"fake AMD nodes: {', '.join(bed.add_fake_nodes(2))}")
        report.say(bed.kubectl("apply", "-f", "examples/").rstrip())
        until("fleet Ready", lambda: is_ready_at(watch, 1), 300, every=0.5)
        watch.table()
    with report.stage("chat completion", "the openai package streams through the Service"):
        chat(bed, report)
    with report.stage("load 1 -> 3", f"at most {LOAD_SECONDS} s of clients in a closed loop"):
        raise_load(bed, report, watch)
    with report.stage("no load 3 -> 1", "the fleet shrinks, each replica drained first"):
        until("back to one replica", lambda: is_ready_at(watch, 1), 180, every=1)
        watch.table()
        print_decisions(bed, report)


def is_ready_at(watch: FleetWatch, replicas: int) -> tuple[Json | None, str]:
    """The fleet when exactly this many replicas exist and are ready."""
    found = watch.look(FLEET)
    status = (found or {}).get("status") or {}
    counts = [status.get(key, 0) for key in ("replicas", "readyReplicas", "desiredReplicas")]
    draining = status.get("drainingReplicas", 0)
    why = f"replicas, ready, desired {counts}, draining {draining}"
    return (found if counts == [replicas] * 3 and not draining else None), why


def chat(bed: Testbed, report: Report) -> None:
    """One streamed answer, shown as it comes."""
    with bed.endpoint(FLEET) as url:
        report.say(f"POST {url}/v1/chat/completions: {QUESTION}")
        client = bed.start(sys.executable, "-u", CLIENT, "stream", f"{url}/v1", FLEET, QUESTION)
        if status := client.wait(timeout=120):
            raise TestbedError(f"the streamed chat completion ended with exit status {status}")


def raise_load(bed: Testbed, report: Report, watch: FleetWatch) -> None:
    """Clients in a closed loop until the fleet has grown to its maximum and all are ready."""
    command = ["--clients", "24", "--seconds", str(LOAD_SECONDS), "--max-tokens", "96"]
    with bed.endpoint(FLEET) as url:
        load = bed.start(
            *(sys.executable, "-u", CLIENT, "load", f"{url}/v1", FLEET, *command),
            stdout=subprocess.PIPE,
        )
        try:
            # Each look is a kubectl, which costs the replicas of a small machine their time.
            until("three replicas ready", lambda: is_ready_at(watch, 3), LOAD_SECONDS, every=1)
        finally:
            load.terminate()
            lines = load.communicate(timeout=30)[0].splitlines()
    for line in lines[:: max(1, len(lines) // 8)]:
        report.say(f"load: {line}")
    last: Json = json.loads(lines[-1]) if lines else {}
    if not last.get("completions"):
        raise TestbedError(f"no request of the load was answered: {last}")
    report.say(f"{last['completions']} completions, {last['errors']} errors")
    watch.table()


def print_decisions(bed: Testbed, report: Report) -> None:
    """The last decisions, as the object tells them."""
    found = bed.get("infd", FLEET) or {}
    for decision in (found.get("status") or {}).get("decisions") or []:
        numbers = f"{decision.get('from')} -> {decision.get('to')}"
        report.say(f"{decision.get('time')}  {numbers}  {decision.get('reason')}")


def print_how_to_go_on(bed: Testbed) -> None:
    """Commands for the cluster that KEEP=1 leaves."""
    enter = " ".join(bed.enter)
    path, kubeconfig = bed.environment["PATH"].split(":")[0], bed.environment["KUBECONFIG"]
    print(f"\nKEEP=1: the cluster goes on. Its tools: {path}; KUBECONFIG={kubeconfig}")
    print(f"  {enter} env KUBECONFIG={kubeconfig} {path}/kubectl get infd -A".replace("  ", " "))
    print("  stop it: make cluster-down")


if __name__ == "__main__":
    sys.exit(main())
