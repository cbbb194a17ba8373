"""The local cluster itself: names, addresses, images, fake nodes, crash, interrupt, no traces.

It runs beside any other cluster of the kit: own cache folder, same binaries.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KIT = ROOT / "hack" / "cluster"
KERNEL_SETTINGS = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")
FOREIGN = os.environ.get("KUBECONFIG") or os.environ.get("CLUSTER", "kit") != "kit"
PUSH = Path(__file__).with_name("push_image.py")

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(FOREIGN), reason="the tests were pointed at a cluster of the user's"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the kit makes namespaces and needs root"),
]


class Kit:
    """The kit's command line with folders of its own."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.cgroup = ""
        self.environment = {**os.environ, "TILEFLEET_CACHE": str(cache)}
        self.environment.pop("TILEFLEET_RUN", None)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(KIT), *arguments]

    def run(self, *arguments: str, status: int | None = 0, text: str = "") -> str:
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert status is None or done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def kubectl(self, *arguments: str, text: str = "", status: int | None = 0) -> str:
        return self.run("exec", "--", "kubectl", *arguments, text=text, status=status)

    def wait_ready(self, pod: str) -> None:
        condition = ("--for=condition=Ready", f"pod/{pod}", "--timeout=60s")
        if "condition met" not in self.kubectl("wait", *condition, status=None):
            log = (self.cache / "run" / "log" / "kubelet.log").read_text()[-6000:]
            pytest.fail(self.kubectl("describe", "pod", pod) + log)

    def exports(self) -> dict[str, str]:
        lines = self.run("env").splitlines()
        return dict(line.removeprefix("export ").split("=", 1) for line in lines)

    def traces(self) -> list[str]:
        """Processes, cgroups, mounts and files of this cluster, seen from outside."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
                if str(self.cache) in words:
                    found.append(words)
        for pattern in (self.cgroup, f"*/{self.cgroup}"):
            found += [str(path) for path in Path("/sys/fs/cgroup").glob(pattern)]
        mounts = Path("/proc/mounts").read_text().splitlines()
        found += [line for line in mounts if str(self.cache) in line]
        found += [str(path) for path in [self.cache / "run"] if path.exists()]
        return found


def outside() -> dict[str, str]:
    """What the kit must leave as it was: kernel settings, interfaces, fixed folders."""
    state = {name: Path("/proc/sys", name).read_text() for name in KERNEL_SETTINGS}
    state["interfaces"] = " ".join(sorted(os.listdir("/sys/class/net")))
    for folder in ("/var/lib/kubelet", "/var/lib/cni", "/var/log/containers"):
        state[folder] = str(os.path.exists(folder))
    return state


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """A running cluster; the programs are those of the default cache, built there if missing."""
    listing = subprocess.run(
        [sys.executable, str(KIT), "binaries"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    programs = dict(line.split("\t") for line in listing.splitlines())
    # No machine has the kit's own pause program, so it always lies in the cache.
    versions = Path(programs["pause"]).parents[1]
    cache = tmp_path_factory.mktemp("kit")
    (cache / versions.name).symlink_to(versions)
    found = Kit(cache)
    found.run("up")
    found.cgroup = json.loads((cache / "run" / "state.json").read_text())["cgroup"]
    assert found.traces() != []
    yield found
    found.run("down")


def python_pod(name: str, code: str) -> str:
    """A pod that runs the machine's own Python on the one image that needs no registry."""
    prefix = sys.base_prefix
    folders = {"/usr": "/usr", "/lib": "/usr/lib", "/lib64": "/usr/lib64"}
    if not prefix.startswith("/usr"):
        folders[prefix] = prefix
    names = {target: f"v{number}" for number, target in enumerate(folders)}
    container = {
        "name": "main",
        "image": "kit.local/pause:1",
        "imagePullPolicy": "Never",
        "command": [f"{prefix}/bin/python3", "-u", "-c", code],
        "volumeMounts": [
            {"name": names[target], "mountPath": target, "readOnly": True} for target in folders
        ],
    }
    volumes = [
        {"name": names[target], "hostPath": {"path": source}} for target, source in folders.items()
    ]
    spec = {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
    metadata = {"name": name, "labels": {"app": name}}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


SERVE = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000, bind='0.0.0.0')"
ASK = """
import urllib.request, ssl, os
for url in ("http://web:8000/usr/", "http://web.default.svc.cluster.local:8000/usr/"):
    print(url, urllib.request.urlopen(url, timeout=5).status)
base = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
trust = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
for host in (base, "https://kubernetes.default.svc"):
    context = ssl.create_default_context(cafile=trust)
    print(host, urllib.request.urlopen(host + "/version", context=context, timeout=5).status)
"""


def test_pods_and_the_host_side_reach_services_by_name_and_address(kit: Kit) -> None:
    kit.kubectl("apply", "-f", "-", text=python_pod("web", SERVE))
    kit.kubectl("expose", "pod", "web", "--port=8000")
    kit.wait_ready("web")
    host = "import urllib.request as u; print(u.urlopen('http://web.default.svc:8000/').status)"
    wait_until(
        lambda: "200" in kit.run("exec", "--", sys.executable, "-c", host, status=None),
        "the Service answers by name from the host side",
    )
    kit.kubectl("apply", "-f", "-", text=python_pod("client", ASK))
    done = "--for=jsonpath={.status.phase}=Succeeded"
    kit.kubectl("wait", done, "pod/client", "--timeout=60s", status=None)
    assert kit.kubectl("logs", "client").count(" 200") == 4


def test_a_pod_runs_an_image_that_was_pushed_to_the_registry(kit: Kit) -> None:
    registry = kit.exports()["REGISTRY"]
    archive = kit.cache / "run" / "pause.tar"
    kit.run("exec", "--", sys.executable, str(PUSH), str(archive), registry, "e2e/pause")
    kit.kubectl("run", "pulled", f"--image={registry}/e2e/pause:1", "--image-pull-policy=Always")
    kit.wait_ready("pulled")


def test_the_audit_log_names_user_verb_and_object(kit: Kit) -> None:
    kit.kubectl("create", "configmap", "audited", "--from-literal=a=b")
    kit.kubectl("create", "serviceaccount", "reader")
    reader = "system:serviceaccount:default:reader"
    kit.kubectl("get", "configmaps", "--as", reader, status=1)
    lines = Path(kit.exports()["AUDIT_LOG"]).read_text().splitlines()
    events = [json.loads(line) for line in lines]
    writes = [
        (event["user"]["username"], event["verb"], event["responseStatus"]["code"])
        for event in events
        if event.get("objectRef", {}).get("name") == "audited"
    ]
    assert writes == [("kit-admin", "create", 201)]
    reads = {event["user"]["username"] for event in events if event["verb"] in ("get", "list")}
    assert all(name.startswith("system:serviceaccount:") for name in reads), reads


def test_fake_nodes_take_only_pods_that_ask_for_them(kit: Kit) -> None:
    kit.run("add-fake-nodes", "2")
    plain = {"name": "main", "image": "none"}
    gpu = {**plain, "resources": {"limits": {"amd.com/gpu": "8"}}}
    tolerate = [{"key": "amd.com/gpu", "operator": "Exists"}]
    pods = {f"gpu-{n}": {"containers": [gpu], "tolerations": tolerate} for n in range(3)}
    pods["intruder"] = {"containers": [plain], "nodeSelector": {"amd.com/gpu.device-id": "74a1"}}
    for name, spec in pods.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kit.kubectl("apply", "-f", "-", text=json.dumps(pod))

    def phases() -> list[str]:
        columns = "jsonpath={range .items[*]}{.metadata.name}={.status.phase} {end}"
        return kit.kubectl("get", "pods", "-o", columns).split()

    wait_until(lambda: sum(p in phases() for p in [f"gpu-{n}=Running" for n in range(3)]) == 2, "2")
    assert sum(p.startswith("gpu-") and p.endswith("=Pending") for p in phases()) == 1
    assert "intruder=Pending" in phases()
    kit.kubectl("delete", "pod", *pods, "--wait=false")
    kit.run("remove-fake-nodes")
    assert "fake-mi300x" not in kit.kubectl("get", "nodes", "-o", "name")


def test_a_second_start_says_that_the_cluster_runs(kit: Kit) -> None:
    before = kit.exports()["TILEFLEET_INIT_PID"]
    assert "already runs" in kit.run("up")
    assert kit.exports()["TILEFLEET_INIT_PID"] == before


def test_a_start_after_a_crash_cleans_up_and_works(kit: Kit) -> None:
    kit.kubectl("run", "left-over", "--image=kit.local/pause:1", "--image-pull-policy=Never")
    kit.wait_ready("left-over")
    os.kill(int(kit.exports()["TILEFLEET_INIT_PID"]), signal.SIGKILL)
    wait_until(lambda: "down" in kit.run("status", status=None), "the cluster is down", 20)
    assert "not running" in kit.run("env", status=1)
    assert "ended without `down`" in kit.run("up")
    kit.kubectl("run", "again", "--image=kit.local/pause:1", "--image-pull-policy=Never")
    kit.wait_ready("again")
    assert "left-over" not in kit.kubectl("get", "pods", "-o", "name")


@pytest.mark.parametrize("moment", ["state.json", "log/etcd.log", "log/kubelet.log"])
def test_an_interrupted_start_leaves_nothing(kit: Kit, moment: str) -> None:
    """moment: the file whose appearance the Ctrl-C follows: early, in the middle, near the end."""
    kit.run("down")
    before = outside()
    # A job in the background of a shell inherits an ignored SIGINT; a terminal's does not.
    with subprocess.Popen(
        kit.command("up"),
        env=kit.environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        wait_until((kit.cache / "run" / moment).exists, f"{moment} appears")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert kit.traces() == []
    assert outside() == before


def test_down_leaves_nothing(kit: Kit) -> None:
    kit.run("down")
    before = outside()
    kit.run("up")
    kit.kubectl("run", "one", "--image=kit.local/pause:1", "--image-pull-policy=Never")
    kit.wait_ready("one")
    visitor = kit.command("exec", "--", "sleep", "600")
    with subprocess.Popen(visitor, env=kit.environment) as process:
        wait_until(lambda: _in_namespace(process.pid, kit), "the visitor is inside", 20)
        kit.run("down")
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert kit.traces() == []
    assert outside() == before
    assert "down" in kit.run("status", status=1)


def _in_namespace(pid: int, kit: Kit) -> bool:
    init = kit.exports()["TILEFLEET_INIT_PID"]
    return os.readlink(f"/proc/{pid}/ns/net") == os.readlink(f"/proc/{init}/ns/net")
