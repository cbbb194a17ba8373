"""The kubectl plugin, run as a user runs it, against a small API server over real HTTP."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.operator.builders import DEFAULTS, NOW, UID, document, record, stats
from tests.operator.plugin_cluster import PluginCluster, kubeconfig, serving
from tests.operator.test_hardware import FIXTURES
from tilefleet_operator.api import parse
from tilefleet_operator.cli.kubectl import build_parser, main
from tilefleet_operator.desired import pod as rendered
from tilefleet_operator.desired import revision
from tilefleet_operator.observed import Snapshot, WorkerStats, pod_view
from tilefleet_operator.plan import plan
from tilefleet_operator.units import rfc3339

FLEETS = "/apis/tilefleet.io/v1alpha1/inferencedeployments"
PODS, NODES = "/api/v1/pods", "/api/v1/nodes"
Run = Callable[..., tuple[int, str, str]]
Json = dict[str, Any]


@pytest.fixture
def cluster() -> Iterator[PluginCluster]:
    cluster = PluginCluster()
    cluster.objects |= {FLEETS: [], PODS: [], NODES: []}
    with serving(cluster):
        yield cluster


@pytest.fixture
def run(
    cluster: PluginCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(cluster, tmp_path, "team")))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def answer(worker: WorkerStats) -> Json:
    """The /stats document of a worker."""
    body = asdict(worker)
    return body | {"version": 1, "startup": []}


def fleet(cluster: PluginCluster, *, ready: int = 2, **spec: Any) -> list[str]:
    """A fleet with two pods and the status that the operator's own plan reports of it."""
    body = document(**({"replicas": 2, "autoscaling": {"mode": "Manual"}} | spec))
    body["metadata"]["creationTimestamp"] = rfc3339(NOW - 7200)
    of = parse(body)
    new = revision(of, DEFAULTS)
    pods = [rendered(of, slot, new, DEFAULTS) for slot in range(2)]
    for slot, pod in enumerate(pods):
        pod["metadata"] |= {"uid": f"p{slot}", "creationTimestamp": rfc3339(NOW - 600)}
        if slot < ready:
            pod["spec"]["nodeName"] = "n1"
            conditions = [{"type": "Ready", "status": "True"}]
            pod["status"] = {
                "phase": "Running",
                "podIP": f"10.0.0.{slot}",
                "conditions": conditions,
            }
        else:
            scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                         "message": "0/3 nodes are available"}  # fmt: skip
            pod["status"] = {"phase": "Pending", "conditions": [scheduled]}
        cluster.put(PODS, pod)
    made = plan(Snapshot(of, tuple(map(pod_view, pods))), DEFAULTS, NOW)
    assert made.status is not None
    cluster.put(FLEETS, body | {"status": dict(made.status)})
    return [pod["metadata"]["name"] for pod in pods]


def test_status_of_all_fleets(cluster: PluginCluster, run: Run) -> None:
    fleet(cluster, ready=1)
    code, out, _ = run("status")
    assert code == 0
    header, row = out.splitlines()
    assert header.split()[:2] == ["NAMESPACE", "NAME"]
    assert row.split()[:5] == ["team", "llm", "Manual", "2", "1"]
    assert "InsufficientResources: pod llm-" in row
    assert run("status", "-n", "elsewhere")[1].startswith("no InferenceDeployment")
    assert run("status", "-A")[1] == out
    assert run("status", "--context", "plain")[1].startswith("no InferenceDeployment")


def test_status_of_one_fleet_shows_each_replica_with_its_load(
    cluster: PluginCluster, run: Run
) -> None:
    first, second = fleet(cluster, ready=1)
    cluster.stats[first] = answer(stats(running=3, waiting=2, kv_blocks_used=5_000))
    code, out, _ = run("status", "llm")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows[first][1] == "ready"
    assert rows[first][4:7] == ["3", "2", "20%"]
    assert rows[second][1] == "pending"
    assert "0/3 nodes are available" in out
    (_, shown, _) = run("status", "llm", "-o", "json")
    replica = json.loads(shown)["replicas"][0]
    assert replica["load"] == {"running": 3, "waiting": 2, "kvUsed": 0.2}
    assert replica["current"] is True


def test_status_without_permission_to_ask_workers_says_so(cluster: PluginCluster, run: Run) -> None:
    fleet(cluster)
    cluster.forbidden.add("/proxy/")
    _, out, _ = run("status", "llm")
    assert out.count("needs the verb get on pods/proxy") == 2
    assert "proxy" not in run("status", "llm", "--no-load")[1]


def test_a_fleet_that_is_not_there_is_bad_input(cluster: PluginCluster, run: Run) -> None:
    code, _, err = run("status", "absent")
    assert (code, "no InferenceDeployment 'absent' in namespace team" in err) == (2, True)
    del cluster.objects[FLEETS]
    assert "does not know InferenceDeployment" in run("status")[2]


def test_a_refusal_of_the_server_is_status_1(cluster: PluginCluster, run: Run) -> None:
    cluster.forbidden.add("inferencedeployments")
    code, _, err = run("status")
    assert code == 1
    assert "user cannot get" in err


def test_explain_gives_the_formula_with_its_numbers(cluster: PluginCluster, run: Run) -> None:
    fleet(cluster, autoscaling={"mode": "Auto", "minReplicas": 1, "maxReplicas": 8})
    status = cluster.objects[FLEETS][0]["status"]
    status["desiredReplicas"] = 4
    status["demand"] = {"tokensPerSecond": 14100, "queueTokens": 0}
    status["capacity"] = {"tokensPerSecondPerReplica": 5200, "source": "Observed"}
    inputs = {"arrivalsPerSecond": "47"}
    why = "load needs 4 replicas, more than 2"
    decision = {"time": rfc3339(NOW), "from": 2, "to": 4, "reason": why, "inputs": inputs}
    status["decisions"] = [decision]
    code, out, _ = run("explain", "llm")
    assert code == 0
    assert "ceil(14100 / (0.85 × 5200)) = 4" in out
    assert "in limits  4" in out
    assert "held at" not in out
    assert why in out
    assert "arrivalsPerSecond=47" in out
    status["demand"]["queueTokens"] = 300_000
    assert "= 5, Q = 300000 tokens wait" in run("explain", "llm")[1]
    status["demand"] = {"tokensPerSecond": 100, "queueTokens": 0}
    assert "held at    4: down only to the largest need of the last 60s" in run("explain", "llm")[1]
    del status["demand"]
    assert "not known yet, so the size is held" in run("explain", "llm")[1]


def test_explain_says_why_pending_and_why_not_each_node(cluster: PluginCluster, run: Run) -> None:
    accelerator = {"vendor": "amd", "products": ["MI300X"], "count": 8}
    fleet(cluster, ready=0, accelerator=accelerator)
    for name in ("spx8", "vf1", "cpx64", "sick"):
        cluster.put(NODES, FIXTURES[name])
    cluster.put(NODES, {"metadata": {"name": "plain"}, "status": {}})
    code, out, _ = run("explain", "llm")
    assert code == 0
    assert "2 replicas wanted: mode Manual, spec.replicas 2" in out
    assert out.count("Unschedulable: 0/3 nodes are available") == 2
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["spx8"].endswith("room for a replica")
    assert "1 of 1 amd.com/gpu are free, a replica needs 8" in rows["vf1"]
    assert "no: partition cpx_nps4, not 8 whole GPUs" in rows["cpx64"]
    assert "taint" in rows["sick"]
    assert "plain" not in rows
    assert "no AMD device" in run("explain", "llm", "--node", "plain")[1]
    code, _, err = run("explain", "llm", "--node", "absent")
    assert (code, "no node 'absent'" in err) == (2, True)


def test_explain_without_permission_for_nodes_says_so(cluster: PluginCluster, run: Run) -> None:
    fleet(cluster, accelerator={"vendor": "amd"})
    cluster.forbidden.add("/nodes")
    code, out, _ = run("explain", "llm")
    assert (code, "nodes cannot be judged: user cannot get" in out) == (0, True)


def test_drain_orders_what_the_operator_would(cluster: PluginCluster, run: Run) -> None:
    first, _ = fleet(cluster)
    code, out, _ = run("drain", "llm", first)
    assert (code, out) == (0, f"{first} drains\n")
    ((where, query, body),) = cluster.writes
    assert where == f"/api/v1/namespaces/team/pods/{first}"
    assert query["fieldManager"] == "tilefleet-drain"
    metadata = body["metadata"]
    assert (metadata["uid"], metadata["labels"]) == ("p0", {"tilefleet.io/state": "draining"})
    observed = pod_view({**body, "metadata": {**metadata, "creationTimestamp": rfc3339(NOW)}})
    assert observed.state == "draining"
    assert observed.drain_started is not None


def test_drain_refuses_what_is_not_its_pod_and_what_would_not_be_replaced(
    cluster: PluginCluster, run: Run
) -> None:
    first, _ = fleet(cluster)
    code, _, err = run("drain", "llm", "other")
    assert (code, f"it has: {first}" in err) == (2, True)
    code, _, err = run("drain", "llm", first, "--wait", "--timeout", "soon")
    assert (code, "'soon' is not a duration" in err) == (2, True)
    cluster.objects[FLEETS][0]["spec"]["paused"] = True
    code, _, err = run("drain", "llm", first)
    assert (code, "rollout resume llm" in err) == (2, True)
    assert cluster.writes == []


def test_drain_waits_until_the_pod_is_gone_or_time_is_up(cluster: PluginCluster, run: Run) -> None:
    first, _ = fleet(cluster)
    cluster.objects[PODS][0]["metadata"]["labels"]["tilefleet.io/state"] = "draining"
    cluster.stats[first] = answer(stats(running=4, draining=True))
    code, out, _ = run("drain", "llm", first, "--wait", "--timeout", "100ms")
    assert code == 1
    assert out.splitlines() == [
        f"{first} is leaving already",
        f"{first}: 4 requests left",
        f"{first} is still there after 0.1 s",
    ]


def test_rollout_status_is_complete_or_says_what_is_missing(
    cluster: PluginCluster, run: Run
) -> None:
    fleet(cluster)
    assert run("rollout", "status", "llm")[:2][0] == 0
    body = cluster.objects[FLEETS][0]
    assert f"revision {body['status']['updateRevision']}" in run("rollout", "status", "llm")[1]
    body["metadata"]["generation"] = 2
    code, out, _ = run("rollout", "status", "llm")
    assert (code, "has not seen the last change" in out) == (1, True)
    body["status"]["observedGeneration"] = 2
    body["status"]["readyReplicas"] = 1
    code, out, _ = run("rollout", "status", "llm", "--watch", "--timeout", "1ms")
    assert (code, out) == (1, "llm: 1 of 2 replicas are ready\n")


def test_rollout_pause_and_resume_set_one_field(cluster: PluginCluster, run: Run) -> None:
    fleet(cluster)
    assert run("rollout", "resume", "llm")[1] == "llm is not paused\n"
    assert run("rollout", "pause", "llm")[1] == "llm is paused\n"
    ((where, query, body),) = cluster.writes
    assert where.endswith("/namespaces/team/inferencedeployments/llm")
    assert query["fieldManager"] == "kubectl-tilefleet"
    assert (body["spec"], body["metadata"]["uid"]) == ({"paused": True}, UID)
    cluster.objects[FLEETS][0]["spec"]["paused"] = True
    assert run("rollout", "resume", "llm")[1] == "llm is resumed\n"
    assert cluster.writes[-1][2]["spec"] == {"paused": False}


def recorded_changes(cluster: PluginCluster) -> list[str]:
    """Two recorded revisions of the fleet; the second is the present one."""
    fleet(cluster)
    records = []
    for number, tokens in enumerate((64, 128), start=1):
        of = parse(document(replicas=2, engine={"maxBatchTokens": tokens}))
        body = record(of, number)
        body["metadata"]["creationTimestamp"] = rfc3339(NOW)
        cluster.put("/apis/apps/v1/controllerrevisions", body)
        records.append(body["metadata"]["labels"]["tilefleet.io/revision"])
    cluster.objects[FLEETS][0]["status"]["currentRevision"] = records[1]
    return records


def test_rollout_history_lists_what_is_recorded(cluster: PluginCluster, run: Run) -> None:
    first, second = recorded_changes(cluster)
    code, out, _ = run("rollout", "history", "llm")
    header, *rows = [line.split() for line in out.splitlines()]
    assert (code, header) == (0, ["NUMBER", "REVISION", "AGE", "MODEL", "IMAGE", "STATE"])
    assert [row[:2] for row in rows] == [["1", first], ["2", second]]
    assert rows[1][3:] == ["file:///models/tiny", "cpu:1", "current"]
    shown = json.loads(run("rollout", "history", "llm", "-o", "json")[1])
    assert [one["spec"]["engine"]["maxBatchTokens"] for one in shown] == [64, 128]


def test_rollout_undo_writes_the_earlier_spec_of_this_very_object(
    cluster: PluginCluster, run: Run
) -> None:
    first, second = recorded_changes(cluster)
    code, out, _ = run("rollout", "undo", "llm")
    assert (code, out) == (0, f"llm has the spec of revision {first} (number 1) again\n")
    ((where, query, operations),) = cluster.writes
    assert where.endswith("/namespaces/team/inferencedeployments/llm")
    assert query == {"fieldManager": "kubectl-tilefleet"}
    assert operations[0] == {"op": "test", "path": "/metadata/uid", "value": UID}
    written = {one["path"]: one["value"] for one in operations[1:]}
    assert sorted(written) == ["/spec/accelerator", "/spec/engine", "/spec/model",
                               "/spec/rollout/drain"]  # fmt: skip
    assert written["/spec/engine"]["maxBatchTokens"] == 64
    assert second in run("rollout", "undo", "llm", "--to-revision", "2")[1]
    code, _, err = run("rollout", "undo", "llm", "--to-revision", "7")
    assert code != 0
    assert "revision 7 is not recorded; recorded: 1, 2" in err


def test_logs_name_the_replica_of_each_line(cluster: PluginCluster, run: Run) -> None:
    first, second = fleet(cluster)
    cluster.logs = {first: "one\ntwo\n", second: "three\n"}
    code, out, _ = run("logs", "llm", "--tail", "5", "--since", "2m")
    assert (code, out) == (0, f"{first} one\n{first} two\n{second} three\n")
    assert cluster.queries[0] == {"container": "worker", "tailLines": "5", "sinceSeconds": "120"}
    assert run("logs", "llm", second, "-f", "--tail", "-1")[1] == "three\n"
    assert cluster.queries[-1] == {"container": "worker", "follow": "true"}
    del cluster.logs[first]
    code, out, err = run("logs", "llm", "--previous")
    assert (code, out, err) == (1, f"{second} three\n", f"{first}: no endpoints\n")


def test_top_shows_rates_between_two_looks(cluster: PluginCluster, run: Run) -> None:
    first, second = fleet(cluster)
    cluster.stats[first] = answer(stats(running=2, kv_blocks_used=2_500))
    code, out, _ = run("top", "llm", "--interval", "100ms", "-o", "json")
    assert code == 0
    one, other = json.loads(out)
    figures = one["figures"]
    assert (one["replica"], figures["running"], figures["kvUsedShare"]) == (first, 2, 0.1)
    assert (other["replica"], other["figures"]) == (second, None)
    assert "503" in other["why"]
    table = run("top", "--interval", "100ms")[1].splitlines()
    assert table[1].split()[:2] == ["llm", first]


def test_every_command_and_flag_has_help() -> None:
    def flags(parser: Any) -> Iterator[Any]:
        for action in parser._actions:
            yield action
            if hasattr(action, "choices") and isinstance(action.choices, dict):
                for one in action.choices.values():
                    yield from flags(one)

    for action in flags(build_parser()):
        named = isinstance(action.choices, dict)
        assert action.help or named, action
