"""Revisions: which spec is which, what is recorded, what restarts nothing, the way back."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator import builders
from tests.operator.builders import DEFAULTS, NOW, children, document, manual, pod, snapshot
from tests.operator.test_rollout import condition, fleet_of, rolled
from tilefleet_operator import desired
from tilefleet_operator.actions import Apply, Delete
from tilefleet_operator.api import InferenceDeployment, Spec, parse
from tilefleet_operator.crd import spec_schema
from tilefleet_operator.desired import Defaults, revision
from tilefleet_operator.errors import RevisionNotFound
from tilefleet_operator.history import (
    REVISION_KIND,
    TEMPLATE_PATHS,
    Revision,
    current,
    record,
    revisions,
    template,
    undo,
)
from tilefleet_operator.plan import plan

NEWER = Defaults(worker_image="rocm:2", worker_cpu_image="cpu:2")


def written(of: InferenceDeployment, number: int = 1, defaults: Defaults = DEFAULTS) -> Revision:
    """The record of a spec as it is read back."""
    wanted, _ = current(of, (), defaults)
    return replace(wanted, number=number, uid=f"uid-{number}")


def changed(tokens: int, **more: Any) -> InferenceDeployment:
    return manual(1, engine={"maxBatchTokens": tokens}, **more)


# A value other than the default for each field of the spec, by its path.
EDITS: dict[str, Any] = {
    "model.uri": "file:///models/other",
    "model.name": "other",
    "model.secretRef.name": "hf",
    "model.secretRef.key": "k",
    "model.maxModelLen": 512,
    "engine.image": "x/y:1",
    "engine.args": ["--seed", "1"],
    "engine.kvCache.memory": "1Gi",
    "engine.kvCache.blockSize": 32,
    "engine.kvCache.hostOffload": "1Gi",
    "engine.kvCache.prefixCaching": False,
    "engine.maxBatchTokens": 64,
    "engine.maxConcurrent": 3,
    "engine.resources.cpu": "3",
    "engine.resources.memory": "3Gi",
    "accelerator.nodeSelector": {"a": "b"},
    "accelerator.tolerations": [{"key": "t", "operator": "Exists"}],
    "accelerator.vendor": "amd",
    "accelerator.products": ["MI300X"],
    "accelerator.deviceIDs": ["74a1"],
    "accelerator.count": 1,
    "accelerator.partition.compute": "SPX",
    "accelerator.partition.memory": "NPS1",
    "accelerator.resourceName": "amd.com/gpu",
    "accelerator.fallbacks": [{"products": ["MI210"]}],
    "accelerator.packing": "Spread",
    "replicas": 3,
    "autoscaling.mode": "Manual",
    "autoscaling.minReplicas": 2,
    "autoscaling.maxReplicas": 9,
    "autoscaling.targetUtilization": "0.5",
    "autoscaling.scaleUp.maxStepPercent": 50,
    "autoscaling.scaleUp.maxStepPods": 2,
    "autoscaling.scaleDown.window": "90s",
    "autoscaling.scaleDown.stepPercent": 50,
    "autoscaling.scaleDown.interval": "9s",
    "capacity.balloon.replicas": 1,
    "capacity.protectStartup": False,
    "capacity.protectServing": True,
    "monitoring.podMonitor": "disabled",
    "rollout.maxSurge": 2,
    "rollout.maxUnavailable": 1,
    "rollout.progressDeadline": "1m",
    "rollout.revisionHistoryLimit": 3,
    "rollout.drain.timeout": "7s",
    "paused": True,
}


# What vendor cpu refuses.
ON_GPUS = {
    f"accelerator.{field}"
    for field in ("products", "deviceIDs", "count", "resourceName", "fallbacks")
}


def leaves(schema: dict[str, Any], path: str = "") -> list[str]:
    """Paths of all fields that hold a value."""
    if "properties" not in schema:
        return [path]
    fields = schema["properties"].items()
    return [leaf for key, part in fields for leaf in leaves(part, f"{path}.{key}".lstrip("."))]


def test_there_is_an_edit_for_every_field() -> None:
    """A new field is proved, too: add its path and a value that is not its default to EDITS."""
    assert sorted(EDITS) == sorted(leaves(spec_schema()))


def edited(edits: dict[str, Any]) -> InferenceDeployment:
    if ON_GPUS & edits.keys():
        edits = {**edits, "accelerator.vendor": "amd"}
    body = document()
    for path, value in edits.items():
        node = body["spec"]
        *above, last = path.split(".")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = copy.deepcopy(value)
    return parse(body)


def unchangeable(of: InferenceDeployment) -> dict[str, Any]:
    """A pod without its annotations, which are changed in place."""
    pod = desired.pod(of, 0, "r", DEFAULTS)
    del pod["metadata"]["annotations"]
    return pod


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(sorted(EDITS)), max_size=4), st.sampled_from(sorted(EDITS)))
def test_whatever_changes_a_pod_is_recorded_and_a_new_revision(base: set[str], more: str) -> None:
    """Equal pods: equal revision. Different pods: another revision, and a different record."""
    before = edited({path: EDITS[path] for path in base})
    after = edited({path: EDITS[path] for path in {*base, more}})
    same_pods = unchangeable(before) == unchangeable(after)
    known = (written(before),)
    wanted, _ = current(after, known, DEFAULTS)
    assert (wanted.name == known[0].name) == same_pods
    if not same_pods:
        assert template(before.spec) != template(after.spec)
        # and what is recorded is enough to make the same pod again
        back = replace(after, spec=Spec.model_validate(dict(known[0].spec)))
        assert desired.revision(back, DEFAULTS) == desired.revision(before, DEFAULTS)


def test_every_field_that_changes_a_pod_lies_on_a_recorded_path() -> None:
    for path, value in EDITS.items():
        changes = revision(edited({path: value}), DEFAULTS) != revision(edited({}), DEFAULTS)
        recorded = any(path.startswith(".".join(parts)) for parts in TEMPLATE_PATHS)
        assert recorded or not changes, path


def test_new_default_image_restarts_nothing_and_comes_with_the_next_change() -> None:
    of = manual(2)
    name = revision(of, DEFAULTS)
    pods = tuple(pod(f"llm-{name}-{slot}", name) for slot in range(2))
    found = snapshot(replace(of, status={"currentRevision": name}), pods, children=children(of))
    after = plan(found, NEWER, NOW)
    assert after.actions == ()
    assert after.status is not None
    said = condition(after.status, "Progressing")
    assert said["reason"] == "Complete"
    assert "cpu:2, which comes with the next change of the spec" in said["message"]
    # one replica more is like its siblings
    grown = plan(replace(found, deployment=manual(3)), NEWER, NOW)
    (added,) = [a for a in grown.actions if isinstance(a, Apply) and a.kind == "Pod"]
    assert added.body["spec"]["containers"][0]["image"] == "cpu:1"
    # a change brings the new image
    other = plan(replace(found, deployment=replace(changed(64), status=of.status)), NEWER, NOW)
    made = next(a for a in other.actions if isinstance(a, Apply) and a.kind == "Pod")
    assert made.body["spec"]["containers"][0]["image"] == "cpu:2"


def test_image_taken_out_of_the_spec_gives_way_to_the_default() -> None:
    named, plain = manual(1, engine={"image": "x/y:1"}), manual(1)
    known = (written(named),)
    assert current(plain, known, DEFAULTS)[0].image == "cpu:1"
    same = (written(manual(1, engine={"image": "cpu:1"})),)
    assert current(plain, same, DEFAULTS)[0].name == same[0].name, "the pods are equal"


def test_operator_that_renders_pods_otherwise_restarts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name of a revision is what it was when it began, whatever a later version renders."""
    of = manual(1)
    known = (written(of),)
    monkeypatch.setattr(desired, "REMOVAL_DELAY_SECONDS", 9)
    assert desired.revision(of, DEFAULTS) != known[0].name
    assert current(of, known, DEFAULTS)[0].name == known[0].name
    # also when the record lacks a field that a later version knows
    spec = copy.deepcopy(dict(known[0].spec))
    del spec["engine"]["maxConcurrent"]
    older = (replace(known[0], spec=spec),)
    assert current(of, older, DEFAULTS)[0].name == known[0].name


def test_record_that_this_version_cannot_read_is_passed_over() -> None:
    of = manual(1)
    strange = Revision("0badf00d", 4, {"engine": {"turbo": True}}, "x", uid="u")
    wanted, used = current(of, (strange,), DEFAULTS)
    assert (wanted.name, wanted.number, used) == (revision(of, DEFAULTS), 5, DEFAULTS)


def test_only_our_own_records_are_read_in_the_order_of_their_numbers() -> None:
    a, b = builders.record(changed(1), 7), builders.record(changed(2), 3)
    foreign = builders.record(replace(changed(3), uid="other"), 9)
    found = {("ControllerRevision", str(i)): one for i, one in enumerate((a, b, foreign))}
    found["Service", "llm"] = {"metadata": {}}
    assert [one.number for one in revisions(found, "cr-uid")] == [3, 7]


def test_a_revision_wanted_again_becomes_the_newest_under_its_name() -> None:
    first, second = written(changed(1), 1), written(changed(2), 2)
    of = changed(1)
    wanted, _ = current(of, (first, second), DEFAULTS)
    (again,) = record(of, wanted, (first, second), ())
    assert isinstance(again, Apply)
    assert again.body["metadata"]["name"] == f"llm-{first.name}"
    assert (again.body["revision"], again.body["data"]["spec"]) == (3, first.spec)
    assert "wanted again" in again.why


def test_records_above_the_limit_go_oldest_first_but_not_those_in_use() -> None:
    known = tuple(written(changed(n), n) for n in range(1, 6))
    of = changed(5, rollout={"revisionHistoryLimit": 2})
    gone = list(record(of, known[-1], known, {known[0].name}))
    assert [(type(a), a.kind, a.name) for a in gone] == [
        (Delete, REVISION_KIND, f"llm-{known[1].name}")
    ]
    none = changed(5, rollout={"revisionHistoryLimit": 0})
    assert len(list(record(none, known[-1], known, ()))) == 4
    assert list(record(changed(5), known[-1], known, ())) == []


def test_undo_is_a_patch_that_brings_the_recorded_pods_back() -> None:
    first, second, third = (written(changed(n), n) for n in (1, 2, 3))
    known = (first, second, third)
    for number, expected in ((0, second), (1, first), (3, third)):
        body = document(replicas=4, engine={"maxBatchTokens": 3}, rollout={"maxSurge": 2})
        body["spec"]["autoscaling"] = {"mode": "Manual"}
        for operation in undo(known, number):
            assert operation["op"] == "add"
            *above, last = operation["path"].removeprefix("/spec/").split("/")
            node = body["spec"]
            for key in above:
                node = node[key]
            node[last] = operation["value"]
        back = parse(body)
        assert current(back, known, DEFAULTS)[0].name == expected.name
        assert (back.spec.replicas, back.spec.rollout.max_surge) == (4, 2)


def test_undo_without_that_revision_names_those_that_are_there() -> None:
    known = (written(changed(1), 4),)
    with pytest.raises(RevisionNotFound, match="revision 9 is not recorded; recorded: 4"):
        undo(known, 9)
    with pytest.raises(RevisionNotFound, match="there is no earlier revision; recorded: 4"):
        undo(known)
    with pytest.raises(RevisionNotFound, match="recorded: none"):
        undo(())


def test_simulated_changes_leave_as_many_records_as_the_limit_and_the_present_one() -> None:
    found = fleet_of(changed(1))
    for tokens in range(2, 7):
        of = changed(tokens, rollout={"revisionHistoryLimit": 2})
        found = replace(found, deployment=replace(of, status=found.deployment.status))
        _, steps = rolled(found, start_seconds=1, drain_seconds=1)
        found = steps[-1][0].snapshot
    numbers = [one.number for one in revisions(found.children, "cr-uid")]
    assert numbers == [4, 5, 6]
    assert found.deployment.status["currentRevision"] == revision(found.deployment, DEFAULTS)


def test_paused_object_records_nothing() -> None:
    of = changed(1, paused=True)
    assert plan(snapshot(of, children={}), DEFAULTS, NOW).actions == ()
