"""Which cluster a command is for, what its files hold, and what `down` refuses to remove."""

import json
from pathlib import Path

import pytest
from kit import nodes, settings, target, traces
from kit.errors import KitError
from kit.layout import Layout

PLACE = Layout(Path("/cache"), Path("/cache/run"), "v")


@pytest.mark.parametrize(
    ("environment", "external", "kind"),
    [
        ({}, False, "kit"),
        ({"CLUSTER": "kit", "KUBECONFIG": "/mine"}, False, "kit"),
        ({"CLUSTER": "kind"}, False, "kind"),
        ({"KUBECONFIG": "/mine"}, False, "external"),
        ({"KUBECONFIG": "/mine"}, True, "external"),
        # `env` exports the kit's own file: that must not turn `down` into a no-op.
        ({"KUBECONFIG": "/cache/run/admin.kubeconfig"}, False, "kit"),
    ],
)
def test_the_cluster_follows_the_environment(
    environment: dict[str, str], external: bool, kind: str
) -> None:
    assert target.choose(environment, external, PLACE).kind == kind


@pytest.mark.parametrize(
    ("environment", "external", "message"),
    [
        ({"CLUSTER": "minikube"}, False, "CLUSTER=minikube is none of kit, kind, external"),
        ({}, True, "needs KUBECONFIG"),
        ({"CLUSTER": "external"}, False, "needs KUBECONFIG"),
    ],
)
def test_a_wrong_choice_says_what_to_set(
    environment: dict[str, str], external: bool, message: str
) -> None:
    with pytest.raises(KitError, match=message):
        target.choose(environment, external, PLACE)


def test_every_template_fills_in_completely(tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path / "run", "v")
    settings.write_all(layout)
    written = [path for path in (layout.run / "etc").rglob("*") if path.is_file()]
    assert len(written) == len(list(settings.TEMPLATES.iterdir())) + 1
    assert [path.name for path in written if "$" in path.read_text()] == []


def test_a_run_folder_that_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(KitError, match="is not a cluster's run folder"):
        traces.remove(Layout(tmp_path, tmp_path, "v"), heirs=[])
    assert (tmp_path / "thesis.txt").exists()


def test_a_cluster_that_outlives_another_takes_over_what_is_to_be_undone(tmp_path: Path) -> None:
    folder = tmp_path / "kubelet"
    folder.mkdir()
    first, second = Layout(tmp_path, tmp_path / "a", "v"), Layout(tmp_path, tmp_path / "b", "v")
    states = {
        first: traces.Traces("none-a", [str(folder)], {"kernel/panic": "old"}),
        second: traces.Traces("none-b", [], {"kernel/panic": "10"}),
    }
    for layout, state in states.items():
        layout.run.mkdir()
        layout.state.write_text(json.dumps(vars(state)))
    traces.remove(first, heirs=[second.run])
    assert folder.exists()
    assert not first.run.exists()
    assert json.loads(second.state.read_text()) == {
        "cgroup": "none-b",
        "created_folders": [str(folder)],
        "kernel_settings": {"kernel/panic": "old"},
    }
    second.state.write_text(json.dumps(vars(traces.Traces("none-b", [str(folder)], {}))))
    traces.remove(second, heirs=[])
    assert not folder.exists()


def test_fake_nodes_carry_every_form_of_the_labels() -> None:
    listing = json.loads(nodes.manifests(2))
    assert [item["metadata"]["name"] for item in listing["items"]] == [
        "fake-mi300x-0",
        "fake-mi300x-1",
    ]
    node = listing["items"][0]
    labels = node["metadata"]["labels"]
    assert labels["amd.com/gpu.device-id"] == labels["beta.amd.com/gpu.device-id"] == "74a1"
    assert labels["beta.amd.com/gpu.cu-count.304"] == "8"
    assert labels["amd.com/gpu.product-name"] == "AMD_Instinct_MI300X_OAM"
    assert labels["feature.node.kubernetes.io/amd-gpu"] == "true"
    assert node["status"]["allocatable"]["amd.com/gpu"] == "8"
    assert node["spec"]["taints"][0]["key"] == "amd.com/gpu"
    too_long = [key for key in labels if len(key.rpartition("/")[2]) > 63]
    assert too_long == []
