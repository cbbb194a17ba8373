"""What is rendered: restricted pods, AMD placement, arguments, names, revisions."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes_validate import validate

from tests.operator.builders import DEFAULTS, amd, deployment, manual
from tilefleet_operator.api import MAX_NAME_LENGTH
from tilefleet_operator.children import service
from tilefleet_operator.desired import (
    Defaults,
    pod,
    pod_name,
    revision,
    selector,
    worker_args,
)
from tilefleet_operator.units import seconds


def rendered(**spec: Any) -> dict[str, Any]:
    return pod(deployment(**spec), 0, "0a1b2c3d", DEFAULTS)


def test_cpu_pod_meets_the_restricted_pod_security_standard() -> None:
    spec = rendered()["spec"]
    container = spec["containers"][0]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostIPC", "hostNetwork", "hostPID"} & spec.keys()
    assert all(set(v) <= {"name", "emptyDir"} for v in spec["volumes"])
    assert {m["mountPath"] for m in container["volumeMounts"]} == {"/tmp", "/var/lib/tilefleet"}


def test_amd_pod_asks_for_devices_and_finds_their_nodes() -> None:
    spec = pod(amd(1, count=4), 0, "0a1b2c3d", DEFAULTS)["spec"]
    container = spec["containers"][0]
    assert container["image"] == "rocm:1"
    assert container["resources"]["limits"]["amd.com/gpu"] == "4"
    assert container["resources"]["requests"]["amd.com/gpu"] == "4"
    assert {"key": "amd.com/gpu", "operator": "Exists"} in spec["tolerations"]
    shm = next(v for v in spec["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    affinity = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    first = affinity["nodeSelectorTerms"][0]["matchExpressions"][0]
    assert first["key"] == "amd.com/gpu.device-id"
    assert "74a1" in first["values"]
    assert "supplementalGroups" not in spec["securityContext"]
    grouped = pod(amd(1), 0, "0a1b2c3d", replace(DEFAULTS, device_groups=(44, 109)))["spec"]
    assert grouped["securityContext"]["supplementalGroups"] == [44, 109]


@pytest.mark.parametrize("of", [manual(1), amd(1)], ids=["cpu", "amd"])
def test_pods_stay_within_the_restricted_standard(of: Any) -> None:
    """Every control of the standard; the API server judges a real pod in test_apiserver."""
    spec = pod(of, 0, "0a1b2c3d", replace(DEFAULTS, device_groups=(44,)))["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] != 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    kinds = {key for volume in spec["volumes"] for key in volume if key != "name"}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    for container in spec["containers"]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["readOnlyRootFilesystem"] is True
        assert "privileged" not in security
    assert spec["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"] == "llm-worker"


@pytest.mark.parametrize("of", [manual(1), amd(1)], ids=["cpu", "amd"])
def test_rendered_objects_fit_the_schema_of_kubernetes(of: Any) -> None:
    for body in (pod(of, 0, "0a1b2c3d", DEFAULTS), service(of)):
        validate(body, "1.30", strict=True)


def test_arguments_follow_the_worker_contract() -> None:
    of = deployment(
        model={"uri": "hf://org/name@main", "name": "tiny", "maxModelLen": 512},
        engine={
            "kvCache": {"memory": "256Mi", "blockSize": 32, "prefixCaching": False},
            "maxConcurrent": 8,
            "resources": {"cpu": "1500m"},
            "args": ["--api-key-file", "/keys"],
        },
        rollout={"drain": {"timeout": "1m"}},
    )
    assert worker_args(of, Defaults(hf_endpoint="http://hub")) == [
        *("serve", "--model", "hf://org/name@main", "--served-model-name", "tiny"),
        *("--max-model-len", "512", "--backend", "cpu", "--kv-cache-memory", "256Mi"),
        *("--block-size", "32", "--no-prefix-caching", "--max-batch-tokens", "2048"),
        *("--max-concurrent", "8", "--cache-dir", "/var/lib/tilefleet"),
        *("--hf-endpoint", "http://hub", "--drain-timeout", "1m", "--removal-delay", "15s"),
        *("--threads", "2", "--api-key-file", "/keys"),
    ]


def test_claim_is_mounted_read_only_and_named_as_a_path() -> None:
    body = rendered(model={"uri": "pvc://weights/llama/70b"})["spec"]
    assert "file:///models/llama/70b" in body["containers"][0]["args"]
    claim = next(v for v in body["volumes"] if v["name"] == "models")
    assert claim["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    mount = next(m for m in body["containers"][0]["volumeMounts"] if m["name"] == "models")
    assert mount == {"name": "models", "mountPath": "/models", "readOnly": True}
    whole = rendered(model={"uri": "pvc://weights"})["spec"]
    assert "file:///models" in whole["containers"][0]["args"]


def test_hub_token_comes_from_the_named_secret_only() -> None:
    of = {"model": {"uri": "hf://a/b", "secretRef": {"name": "hub", "key": "t"}}}
    env = rendered(**of)["spec"]["containers"][0]["env"]
    assert env[-1] == {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "t"}},
    }
    names = [variable["name"] for variable in rendered()["spec"]["containers"][0]["env"]]
    assert names == ["HOME", "TILEFLEET_REVISION"]


def test_probes_ask_the_admin_port() -> None:
    container = rendered()["spec"]["containers"][0]
    probes = {name: container[name] for name in container if name.endswith("Probe")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {
        "startupProbe": "/startupz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/livez",
    }
    assert all(probe["httpGet"]["port"] == "admin" for probe in probes.values())


@pytest.mark.parametrize("timeout", ["1s", "300s", "10m"])
def test_grace_period_outlasts_drain_removal_and_teardown(timeout: str) -> None:
    body = rendered(rollout={"drain": {"timeout": timeout}})["spec"]
    assert body["terminationGracePeriodSeconds"] > seconds(timeout) + 2 + 15


def test_service_selects_serving_replicas_only() -> None:
    body = service(manual(1))
    assert body["spec"]["selector"] == {
        "tilefleet.io/deployment": "llm",
        "tilefleet.io/role": "worker",
        "tilefleet.io/state": "active",
    }
    labels = pod(manual(1), 0, "0a1b2c3d", DEFAULTS)["metadata"]["labels"]
    assert body["spec"]["selector"].items() <= labels.items()
    wanted = dict(part.split("=") for part in selector(manual(1)).split(","))
    assert wanted == body["spec"]["selector"]


def test_children_are_owned() -> None:
    for body in (rendered(), service(manual(1))):
        (owner,) = body["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == ("cr-uid", True)


def test_children_share_no_mutable_part() -> None:
    of = manual(1)
    first, second = pod(of, 0, "r", DEFAULTS), pod(of, 1, "r", DEFAULTS)
    first["metadata"]["labels"]["x"] = "y"
    first["spec"]["volumes"].append({})
    assert "x" not in second["metadata"]["labels"]
    assert {} not in second["spec"]["volumes"]


def test_revision_changes_with_what_changes_a_pod_and_with_nothing_else() -> None:
    base = revision(manual(1), DEFAULTS)
    same = [
        manual(3),
        deployment(),
        manual(1, paused=True),
        manual(1, rollout={"maxSurge": 2}),
    ]
    assert {revision(of, DEFAULTS) for of in same} == {base}
    other = [
        manual(1, engine={"maxConcurrent": 2}),
        manual(1, engine={"image": "mine:2"}),
        manual(1, model={"uri": "file:///other"}),
        amd(1),
    ]
    changed = {revision(of, DEFAULTS) for of in other}
    assert len(changed) == len(other)
    assert base not in changed
    assert revision(manual(1), Defaults(worker_cpu_image="cpu:2")) != base


@settings(deadline=None)
@given(st.integers(0, 9999))
def test_pod_names_fit_a_host_name(slot: int) -> None:
    of = deployment()
    long = type(of)(**{**of.__dict__, "name": "a" * MAX_NAME_LENGTH})
    assert len(pod_name(long, slot, revision(long, DEFAULTS))) <= 63
