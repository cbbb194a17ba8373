"""The chart renders what it promises, refuses wrong values, and grants what the operator uses."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "tilefleet"
KUBERNETES_VERSION = "1.36"
Values = dict[str, Any]


def rendered(values: Values | None = None, **options: Any) -> dict[str, str]:
    """Template path below templates/ -> text."""
    settings = {"name": "tilefleet", "namespace": "tilefleet-system"} | options
    with helm.Chart.load(str(CHART)) as chart:
        texts: dict[str, str] = chart.render(values or {}, **settings)
    return {path.split("templates/", 1)[1]: text for path, text in texts.items()}


def objects(values: Values | None = None, **options: Any) -> list[dict[str, Any]]:
    texts = rendered(values, **options)
    return [
        found
        for path, text in sorted(texts.items())
        if path.endswith(".yaml")
        for found in yaml.safe_load_all(text)
        if found
    ]


@cache
def default_objects() -> tuple[dict[str, Any], ...]:
    return tuple(objects())


def one(kind: str, found: list[dict[str, Any]], name: str = "tilefleet-operator") -> dict[str, Any]:
    matches = [o for o in found if o["kind"] == kind and o["metadata"]["name"].endswith(name)]
    assert len(matches) == 1, f"{kind} {name}: {len(matches)} found"
    return matches[0]


def pod_specs(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [o["spec"] for o in found if o["kind"] == "Pod"] + [
        o["spec"]["template"]["spec"] for o in found if o["kind"] == "Deployment"
    ]


def granted(values: Values | None = None) -> dict[str, set[str]]:
    """Resource -> verbs that the operator's roles grant, over all its roles."""
    verbs: dict[str, set[str]] = {}
    for role in objects(values):
        if role["kind"] not in ("Role", "ClusterRole") or "-test" in role["metadata"]["name"]:
            continue
        for rule in role["rules"]:
            for resource in rule["resources"]:
                verbs.setdefault(resource, set()).update(rule["verbs"])
    return verbs


def operator_arguments(values: Values | None = None) -> list[str]:
    spec = one("Deployment", objects(values))["spec"]["template"]["spec"]
    arguments: list[str] = spec["containers"][0]["args"]
    return arguments


def test_lint_has_no_warning() -> None:
    result = helm.lint(str(CHART), strict=True)
    assert result["errors"] == []
    # Severity 1 is information: the project has no icon.
    assert [m for m in result["messages"] if m["severity"] > 1] == []


def test_every_object_follows_the_kubernetes_schema() -> None:
    checked = [o for o in default_objects() if o["kind"] != "CustomResourceDefinition"]
    for found in checked:
        kubernetes_validate.validate(found, KUBERNETES_VERSION, strict=True)
    kinds = {found["kind"] for found in checked}
    assert kinds == {
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "Deployment",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "PriorityClass",
        "Role",
        "RoleBinding",
        "ServiceAccount",
    }


def test_the_validator_would_notice_a_wrong_object() -> None:
    broken = copy.deepcopy(one("Deployment", objects()))
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES_VERSION, strict=True)


def test_crd_copy_equals_the_generated_one() -> None:
    copies = {p.name: p.read_bytes() for p in (CHART / "files" / "crds").iterdir()}
    assert copies == {p.name: p.read_bytes() for p in (ROOT / "crds").glob("*.yaml")}
    assert copies, "no CRD in the chart"


def test_rendered_crd_is_the_file_plus_the_keep_annotation() -> None:
    (source,) = (ROOT / "crds").glob("*.yaml")
    expected = yaml.safe_load(source.read_text())
    crd = next(o for o in default_objects() if o["kind"] == "CustomResourceDefinition")
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert crd["spec"] == expected["spec"]
    assert crd["metadata"]["name"] == expected["metadata"]["name"]


def test_crds_can_be_left_out_or_dropped_with_the_release() -> None:
    kinds = {o["kind"] for o in objects({"crds": {"enabled": False}})}
    assert "CustomResourceDefinition" not in kinds
    crds = [
        o for o in objects({"crds": {"keep": False}}) if o["kind"] == "CustomResourceDefinition"
    ]
    assert len(crds) == 1
    assert "helm.sh/resource-policy" not in crds[0]["metadata"].get("annotations", {})


def test_pods_satisfy_pod_security_restricted_with_read_only_root() -> None:
    specs = pod_specs(objects())
    assert len(specs) == 2  # the operator and the test
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 65532
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all(not {"hostPath"} & set(volume) for volume in spec["volumes"])
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"requests", "limits"} <= set(container["resources"])


def test_operator_deployment_survives_one_pod() -> None:
    deployment = one("Deployment", objects())
    assert deployment["spec"]["replicas"] == 2
    (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway"
    budget = one("PodDisruptionBudget", objects())
    selector = deployment["spec"]["selector"]
    assert budget["spec"]["selector"] == selector
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert selector["matchLabels"].items() <= labels.items()
    one_replica = {o["kind"] for o in objects({"replicas": 1})}
    assert "PodDisruptionBudget" not in one_replica


def test_selectors_do_not_find_the_test_pod() -> None:
    selector = one("Deployment", objects())["spec"]["selector"]["matchLabels"]
    test_pod = one("Pod", objects(), "tilefleet-test")
    assert not selector.items() <= test_pod["metadata"]["labels"].items()


def test_upgrade_keeps_the_selector() -> None:
    before = one("Deployment", objects())
    after = one("Deployment", objects({"commonLabels": {"team": "ml"}}, is_upgrade=True))
    assert before["spec"]["selector"] == after["spec"]["selector"]
    assert after["metadata"]["labels"]["team"] == "ml"


def test_probes_point_at_different_questions() -> None:
    container = one("Deployment", objects())["spec"]["template"]["spec"]["containers"][0]
    paths = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness")
    }
    assert paths == {"liveness": "/healthz", "readiness": "/readyz"}
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"probes": 8080, "metrics": 8081}


def test_granted_verbs_are_exactly_these() -> None:
    read = {"get", "list", "watch"}
    assert granted() == {
        "nodes": {"list", "watch"},
        "inferencedeployments": read,
        "controllerrevisions": read | {"create", "patch", "delete"},
        "inferencedeployments/status": {"patch"},
        "inferencedeployments/finalizers": {"update"},
        "pods": {"list", "watch", "create", "patch", "delete"},
        "services": read | {"create", "patch"},
        "serviceaccounts": read | {"create", "patch"},
        "poddisruptionbudgets": read | {"create", "patch"},
        "networkpolicies": read | {"create", "patch", "delete"},
        "podmonitors": {"get", "list", "create", "patch", "delete"},
        "events": {"create", "list"},
        "leases": {"create", "get", "update"},
    }


def test_no_wildcards_no_secrets_no_exec() -> None:
    roles = [o for o in objects() if o["kind"] in ("Role", "ClusterRole")]
    assert len(roles) == 4
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            assert not {"secrets", "pods/exec"} & set(rule["resources"])
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_watching_some_namespaces_narrows_the_cluster_role() -> None:
    found = objects({"watchNamespaces": ["a", "b", "a"]})
    cluster = one("ClusterRole", found)
    assert all({"get", "list", "watch"} >= set(rule["verbs"]) for rule in cluster["rules"])
    fleets = [
        o
        for o in found
        if o["kind"] == "Role" and o["metadata"]["name"].endswith("operator-fleets")
    ]
    assert sorted(o["metadata"]["namespace"] for o in fleets) == ["a", "b"]
    assert "--watch-namespaces=a,b" in operator_arguments({"watchNamespaces": ["a", "b"]})
    assert not [a for a in operator_arguments() if a.startswith("--watch-namespaces")]


def test_lease_is_limited_to_its_name_and_matches_the_flag() -> None:
    role = next(
        o
        for o in objects()
        if o["kind"] == "Role" and o["metadata"]["name"] == "tilefleet-operator"
    )
    by_verbs = {tuple(rule["verbs"]): rule.get("resourceNames") for rule in role["rules"]}
    assert by_verbs == {("create",): None, ("get", "update"): ["tilefleet-operator"]}
    assert "--lease-name=tilefleet-operator" in operator_arguments()


def test_image_reference() -> None:
    digest = "sha256:" + "a" * 64
    image = {
        "registry": "registry.example:5000",
        "repository": "x/worker",
        "tag": "t",
        "digest": digest,
    }
    values = {"image": {"worker": image, "workerCpu": image | {"digest": ""}}}
    arguments = operator_arguments(values)
    assert f"--worker-image=registry.example:5000/x/worker@{digest}" in arguments
    assert "--worker-cpu-image=registry.example:5000/x/worker:t" in arguments
    assert "--worker-image=tilefleet/worker:0.1.0" in operator_arguments()


def test_network_policy_lets_only_the_needed_ports_pass() -> None:
    spec = one("NetworkPolicy", objects())["spec"]
    assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
    assert [p["port"] for rule in spec["ingress"] for p in rule["ports"]] == [8080, 8081]
    assert [p["port"] for rule in spec["egress"] for p in rule["ports"]] == [
        53,
        53,
        443,
        6443,
        8001,
    ]
    off = {o["kind"] for o in objects({"networkPolicy": {"enabled": False}})}
    assert "NetworkPolicy" not in off


@pytest.mark.parametrize(("enabled", "count"), [("auto", 0), (True, 1), ("true", 1), (False, 0)])
def test_pod_monitor_needs_the_api_or_a_clear_yes(enabled: object, count: int) -> None:
    found = objects({"metrics": {"podMonitor": {"enabled": enabled}}})
    assert sum(o["kind"] == "PodMonitor" for o in found) == count


def test_notes_print_the_next_commands() -> None:
    notes = rendered()["NOTES.txt"]
    for command in ("kubectl apply -f -", "get infd -w", "/v1/completions", "helm test tilefleet"):
        assert command in notes
    assert "WARNING" not in notes
    assert "nothing takes over" in rendered({"replicas": 1})["NOTES.txt"]
    assert "deletes the CRD" in rendered({"crds": {"keep": False}})["NOTES.txt"]


def test_names_are_short_and_two_releases_do_not_collide() -> None:
    def names(**options: str) -> set[tuple[str, str, str]]:
        return {
            (o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"])
            for o in objects(**options)
            if o["kind"] != "CustomResourceDefinition"
        }

    first, second = names(namespace="a"), names(namespace="b")
    assert not first & second
    long_names = names(name="r" * 53)
    assert max(len(name) for _, _, name in long_names if "ClusterRole" not in _) <= 80


WRONG_VALUES: list[tuple[Values, str]] = [
    ({"replicas": "two"}, "/replicas"),
    ({"replicas": -1}, "/replicas"),
    ({"replica": 2}, "replica"),
    ({"image": {"operator": {"tag": 1}}}, "/image/operator/tag"),
    ({"image": {"operator": {"tag": "latest"}}}, "/image/operator/tag"),
    ({"image": {"worker": {"digest": "sha256:12"}}}, "/image/worker/digest"),
    ({"image": {"workerCpu": {"repository": ""}}}, "/image/workerCpu/repository"),
    ({"image": {"operator": {"registry": "https://registry.example"}}}, "/image/operator/registry"),
    ({"image": {"operator": {"pullPolicy": "Sometimes"}}}, "/image/operator/pullPolicy"),
    ({"image": {"gateway": {}}}, "gateway"),
    ({"image": {"operator": {"sha": ""}}}, "sha"),
    ({"crds": {"enabled": "yes"}}, "/crds/enabled"),
    ({"crds": {"install": True}}, "install"),
    ({"rbac": {"create": 1}}, "/rbac/create"),
    ({"watchNamespaces": "all"}, "/watchNamespaces"),
    ({"watchNamespaces": ["Team_A"]}, "/watchNamespaces/0"),
    ({"log": {"format": "xml"}}, "/log/format"),
    ({"log": {"level": "debug"}}, "level"),
    ({"hfEndpoint": "mirror.example"}, "/hfEndpoint"),
    ({"imagePullSecrets": ["secret"]}, "/imagePullSecrets/0"),
    ({"networkPolicy": {"apiServerPorts": [70000]}}, "/networkPolicy/apiServerPorts/0"),
    ({"networkPolicy": {"on": True}}, "on"),
    ({"metrics": {"podMonitor": {"enabled": "maybe"}}}, "/metrics/podMonitor/enabled"),
    ({"metrics": {"prometheusRule": {"ttftSeconds": 0}}}, "/metrics/prometheusRule/ttftSeconds"),
    ({"metrics": {"dashboards": {"enabled": "auto"}}}, "/metrics/dashboards/enabled"),
    ({"metrics": {"serviceMonitor": {}}}, "serviceMonitor"),
    ({"resources": {"request": {}}}, "request"),
    ({"resources": {"limits": {"memory": "much"}}}, "/resources/limits/memory"),
    ({"serviceAccount": {"name": "Not Valid"}}, "/serviceAccount/name"),
    ({"podDisruptionBudget": {"enabled": "true"}}, "/podDisruptionBudget/enabled"),
    ({"helmTest": {"modelUri": "ftp://x"}}, "/helmTest/modelUri"),
    ({"helmTest": {"timeoutSeconds": 1}}, "/helmTest/timeoutSeconds"),
    ({"tolerations": {}}, "/tolerations"),
    ({"workers": {"networkPolicy": {"adminFrom": ["Not_A_Name"]}}}, "/adminFrom/0"),
    ({"workers": {"networkPolicy": {"enabled": "no"}}}, "/workers/networkPolicy/enabled"),
    ({"workers": {"deviceGroups": ["render"]}}, "/workers/deviceGroups/0"),
]


@pytest.fixture(scope="module")
def packaged_chart(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chart")
    helm.package(str(CHART), destination=str(folder))
    (archive,) = folder.glob("*.tgz")
    return str(archive)


@pytest.mark.parametrize(("values", "named"), WRONG_VALUES, ids=lambda v: str(v)[:50])
def test_packaged_chart_refuses_wrong_values(
    packaged_chart: str, values: Values, named: str
) -> None:
    """The package, not the folder: a peer's .helmignore drops its schema and nothing is checked."""
    with helm.Chart.load(packaged_chart) as chart, pytest.raises(helm.HelmError) as caught:
        chart.render(values, name="tilefleet", namespace="tilefleet-system")
    assert named in str(caught.value)


def test_packaged_chart_renders_the_same(packaged_chart: str) -> None:
    with helm.Chart.load(packaged_chart) as chart:
        texts = chart.render({"global": {"any": 1}}, name="tilefleet", namespace="tilefleet-system")
    assert {p.split("templates/", 1)[1]: t for p, t in texts.items()} == rendered()


def test_every_value_is_described_and_in_the_schema() -> None:
    """A comment stands above each leaf of values.yaml, or `# --` above the block it is part of."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    described: dict[int, bool] = {}  # indent -> whether the open block at it has a `# --` comment
    for number, line in enumerate(lines):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        described = {depth: yes for depth, yes in described.items() if depth < indent}
        inherited = any(described.values())
        described[indent] = "# --" in comment_above(lines, number)
        is_leaf = not text.endswith(":")
        assert inherited or described[indent] or not is_leaf, f"values.yaml:{number + 1}: {text}"
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]) == set(yaml.safe_load("\n".join(lines)))


def comment_above(lines: list[str], number: int) -> str:
    first = number
    while first > 0 and lines[first - 1].strip().startswith("#"):
        first -= 1
    return "\n".join(lines[first:number])
