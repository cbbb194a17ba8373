"""The command line, run as users run it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tilefleet_operator.cli.tilefleet import main

FLEET = """
apiVersion: tilefleet.io/v1alpha1
kind: InferenceDeployment
metadata: {name: tiny, namespace: demo}
spec:
  model: {uri: "file:///models/tiny"}
  accelerator: {vendor: VENDOR}
  autoscaling: {mode: Manual}
  replicas: 2
"""

NODE = """
---
apiVersion: v1
kind: Node
metadata:
  name: gpu-1
  labels: {amd.com/gpu.product-name: AMD_Instinct_MI300X_OAM, amd.com/gpu.device-id: "74a1"}
spec: {}
status:
  allocatable: {cpu: "64", memory: 512Gi, pods: "110", amd.com/gpu: "1"}
  capacity: {cpu: "64", memory: 512Gi, pods: "110", amd.com/gpu: "1"}
  conditions: [{type: Ready, status: "True"}]
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    file = tmp_path / "fleet.yaml"
    file.write_text(FLEET.replace("VENDOR", "cpu"))
    return file


def test_plan_shows_each_action_with_its_reason(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "-f", str(fleet)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("demo/tiny: 2 wanted, 2 ready at the end")
    assert out.count("Pod/tiny-") == 2
    assert "0 of 2 replicas exist" in out
    assert "AllReplicasReady" in out


def test_plan_as_json_holds_the_whole_objects(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "-f", str(fleet), "-o", "json", "--worker-cpu-image", "w:1"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    pods = [one for one in shown["steps"][0]["actions"] if one["kind"] == "Pod"]
    assert len(pods) == 2
    container = pods[0]["body"]["spec"]["containers"][0]
    assert container["image"] == "w:1"
    assert container["args"][0] == "serve"
    assert {"type", "status", "reason"} <= set(shown["conditions"][0])


def test_plan_takes_nodes_from_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second replica does not fit on one GPU, and the plan says so."""
    file = tmp_path / "amd.yaml"
    file.write_text(FLEET.replace("VENDOR", "amd") + NODE)
    assert main(["plan", "-f", str(file)]) == 0
    out = capsys.readouterr().out
    assert "2 wanted, 1 ready at the end" in out
    assert "InsufficientGPU" in out


def holder(devices: int) -> str:
    """A pod of somebody else on the node."""
    return f"""
---
apiVersion: v1
kind: Pod
metadata: {{name: other, namespace: else, uid: other}}
spec:
  nodeName: gpu-1
  containers: [{{resources: {{limits: {{amd.com/gpu: "{devices}"}}}}}}]
status: {{phase: Running}}
"""


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["plan", *arguments, "-o", "json"]) == 0
    shown: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return shown


def test_devices_of_pods_and_of_fleets_before_are_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight devices: two are somebody's, two go to the first fleet, one of the second finds four
    and the other none."""
    first, second, nodes = (tmp_path / name for name in ("a.yaml", "b.yaml", "nodes.yaml"))
    first.write_text(FLEET.replace("VENDOR", "amd"))
    four = FLEET.replace("VENDOR", "amd, count: 4").replace("name: tiny", "name: large")
    second.write_text(four)
    nodes.write_text(NODE.replace('amd.com/gpu: "1"', 'amd.com/gpu: "8"') + holder(2))
    tiny, large = planned(capsys, "-f", str(first), "-f", str(second), "--nodes", str(nodes))
    assert tiny["replicas"] == {"desiredReplicas": 2, "readyReplicas": 2}
    assert large["replicas"] == {"desiredReplicas": 2, "readyReplicas": 1}
    assert tiny["placement"]["matching"] == [{"node": "gpu-1", "free": 6, "total": 8}]
    assert large["placement"]["matching"] == [{"node": "gpu-1", "free": 4, "total": 8}]


def test_plan_says_why_a_node_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "amd.yaml"
    file.write_text(
        FLEET.replace("VENDOR", "amd") + NODE.replace("spec: {}", "spec: {unschedulable: true}")
    )
    assert main(["plan", "-f", str(file)]) == 0
    assert "gpu-1  -     refused: cordoned" in capsys.readouterr().out


def test_a_settled_fleet_of_a_cluster_has_nothing_to_do(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Objects as the cluster would show them after the plan: the plan is empty."""
    fleet.write_text(fleet.read_text().replace("name: tiny,", "name: tiny, uid: u-1,"))
    (shown,) = planned(capsys, "-f", str(fleet))
    objects = [action["body"] for action in shown["steps"][0]["actions"]]
    for number, body in enumerate(objects):
        if body["kind"] == "Pod":
            body["metadata"] |= {"uid": f"p{number}", "creationTimestamp": "2026-01-01T00:00:00Z"}
            body["spec"]["nodeName"] = "n"
            ready = [{"type": "Ready", "status": "True"}]
            body["status"] = {"phase": "Running", "podIP": "192.0.2.1", "conditions": ready}
    settled = tmp_path / "settled.json"
    settled.write_text(json.dumps({"kind": "List", "items": objects}))
    (again,) = planned(capsys, "-f", str(fleet), "-f", str(settled))
    assert again["steps"] == []
    assert again["replicas"] == {"desiredReplicas": 2, "readyReplicas": 2}
    assert main(["plan", "-f", str(fleet), "-f", str(settled)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_text_is_coloured_only_on_a_terminal(
    fleet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", "-f", str(fleet)]) == 0
    assert "\033[" not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["plan", "-f", str(fleet)]) == 0
    assert "\033[1m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["plan", "-f", str(fleet)]) == 0
    assert "\033[" not in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error(fleet: Path) -> None:
    command = f"{sys.executable} -m tilefleet_operator plan -f {fleet} -o json | head -c 5"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60
    )
    assert result.stderr == ""


def test_plan_reads_standard_input(fleet: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tilefleet_operator", "plan", "-f", "-"],
        input=fleet.read_text(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "demo/tiny" in result.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FLEET.replace("VENDOR", "tpu"), "spec.accelerator.vendor: 'tpu'"),
        (FLEET.replace("VENDOR", "cpu") + "  modle: 1\n", "spec.modle: unknown field"),
        ("kind: [", "fleet.yaml"),
        ("just text", "not a Kubernetes object"),
        ("kind: Service", "a Service has no metadata"),
        ("kind: Service\nmetadata: {name: x}", "no InferenceDeployment"),
        ("kind: List\nitems: [1]", "not a Kubernetes object"),
        (FLEET.replace("VENDOR", "amd") + NODE.replace('"1"', "many"), "Node 'gpu-1'"),
        (FLEET.replace("VENDOR", "amd") + NODE.replace("name: gpu-1", "nam: 1"), "a Node without"),
        ("", "no InferenceDeployment"),
    ],
    ids=["value", "field", "yaml", "text", "bare", "kind", "items", "node", "nameless", "empty"],
)
def test_bad_input_is_said_in_one_line_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(text)
    assert main(["plan", "-f", str(file)]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_file_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-f", "/no/such/file.yaml"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_run_without_credentials_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--kubeconfig", str(tmp_path / "none"), "--log-format", "text"]) == 2
    assert "--kubeconfig" in capsys.readouterr().err


def test_plan_and_crd_load_neither_kopf_nor_a_client() -> None:
    code = (
        "import sys; from tilefleet_operator.cli.tilefleet import main; main(['crd']);"
        "sys.exit(any(m in sys.modules for m in ('kopf', 'kubernetes', 'aiohttp', 'torch')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert result.returncode == 0
    assert b"CustomResourceDefinition" in result.stdout
