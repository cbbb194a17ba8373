"""The command line, run as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tilefleet_operator.cli import main

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
        ("kind: Service", "no InferenceDeployment"),
        ("", "no InferenceDeployment"),
    ],
    ids=["value", "field", "yaml", "text", "kind", "empty"],
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
        "import sys; from tilefleet_operator.cli import main; main(['crd']);"
        "sys.exit(any(m in sys.modules for m in ('kopf', 'kubernetes', 'aiohttp', 'torch')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert result.returncode == 0
    assert b"CustomResourceDefinition" in result.stdout
