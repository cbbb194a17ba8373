"""simulate(): the same decisions as in production, on a world with rooms of known size."""

from dataclasses import replace

from tests.operator.builders import DEFAULTS, NOW, amd, deployment, manual, node, snapshot
from tilefleet_operator.simulation import World, simulate, trace


def test_new_fleet_is_one_step() -> None:
    (only,) = simulate(snapshot(manual(2)), DEFAULTS, NOW)
    assert [action.kind for action in only.actions] == [
        *("ControllerRevision", "ServiceAccount", "Service"),
        *("PodDisruptionBudget", "NetworkPolicy", "Pod", "Pod"),
    ]


def test_third_gpu_replica_stays_pending_and_is_explained() -> None:
    nodes = tuple(node("spx8", f"n{i}") for i in range(2))
    last, _ = trace(World(snapshot(amd(3), nodes=nodes), NOW), DEFAULTS, limit=60)[-1]
    placed = sorted(str(pod.node) for pod in last.snapshot.pods)
    assert placed == ["None", "n0", "n1"]
    status = last.snapshot.deployment.status
    limited = next(c for c in status["conditions"] if c["type"] == "CapacityLimited")
    assert limited["message"].endswith("= 16; short of 8; no node autoscaler reacts")
    assert (status["readyReplicas"], status["pendingReplicas"]) == (2, 1)


def test_devices_of_others_are_not_given_twice() -> None:
    nodes = (node("spx8", "n0"),)
    found = snapshot(amd(2, count=4), nodes=nodes, device_use={"n0": {"amd.com/gpu": 4.0}})
    last, _ = trace(World(found, NOW), DEFAULTS, limit=60)[-1]
    assert sum(pod.ready for pod in last.snapshot.pods) == 1
    assert last.snapshot.device_use["n0"]["amd.com/gpu"] == 8.0


def test_without_known_nodes_gpus_count_as_there() -> None:
    last, final = trace(World(snapshot(amd(2)), NOW), DEFAULTS, limit=60)[-1]
    assert all(pod.ready for pod in last.snapshot.pods)
    assert (final.actions, final.status) == ((), None)


def test_gpu_rollout_without_surge_frees_devices_first() -> None:
    """One node, one replica of all its devices: the old one leaves before the new one comes."""
    rollout = {"maxSurge": 0, "maxUnavailable": 1}
    nodes = (node("spx8", "n0"),)
    settled, _ = trace(World(snapshot(amd(1, rollout=rollout), nodes=nodes), NOW), DEFAULTS)[-1]
    changed = amd(1, rollout=rollout, engine={"maxConcurrent": 7})
    changed = replace(changed, status=settled.snapshot.deployment.status)
    begun = replace(settled.snapshot, deployment=changed)
    steps = trace(World(begun, settled.now), DEFAULTS)
    for world, _ in steps:
        assert world.snapshot.device_use.get("n0", {}).get("amd.com/gpu", 0) <= 8
    last = steps[-1][0].snapshot
    assert [pod.ready for pod in last.pods] == [True]
    assert last.deployment.status["updateRevision"] == last.pods[0].revision


def test_the_limit_ends_a_world_that_never_rests() -> None:
    assert len(trace(World(snapshot(deployment()), NOW), DEFAULTS, start_seconds=1e9, limit=7)) == 7
