"""InferenceDeployment v1alpha1: the spec as frozen types, and parse() from a Kubernetes object.

Every rule stands twice: here as a validator for `tilefleet plan`, and in rules.py as CEL for the
API server; tests/operator/test_crd.py keeps the two and all defaults equal.
Only fields that work are here. Does not know pods, nodes or how anything is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from tilefleet_operator.accelerator import AcceleratorSpec, Capacity
from tilefleet_operator.errors import SpecInvalid
from tilefleet_operator.fields import Duration, Fraction, Model, OptionalQuantity, Quantity
from tilefleet_operator.units import seconds

GROUP = "tilefleet.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceDeployment"
PLURAL = "inferencedeployments"
SINGULAR = "inferencedeployment"
SHORT_NAME = "infd"
CATEGORY = "tilefleet"
FIELD_MANAGER = "tilefleet"

# 48 leaves room for "-<8 hex>-<4 digits>" in a pod name that must also be a host name (63).
MAX_NAME_LENGTH = 48
MAX_REPLICAS = 1000
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
URI_PATTERN = r"^(hf|pvc|file)://[^\s]+$"
# The operator remembers eleven minutes of load.
MAX_WINDOW = "10m"
URI_SCHEMES = ("hf://", "pvc://", "file://")


class SecretRef(Model):
    """A key of a Secret in the object's own namespace."""

    name: Annotated[str, Field(max_length=253)] = Field(
        default="", description="Secret that holds the token; empty: none."
    )
    key: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        default="token", description="Key inside the Secret."
    )


class ModelSpec(Model):
    """Which checkpoint is served, and under which name."""

    uri: Annotated[str, Field(pattern=URI_PATTERN, max_length=1024)] = Field(
        description="Checkpoint: hf://org/name[@revision], pvc://claim/path or file:///path."
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/:-]*$", max_length=128)] = Field(
        default="", description="Name that clients ask for; empty: metadata.name."
    )
    secret_ref: SecretRef = Field(
        default_factory=SecretRef, description="Token for hf://, same namespace only."
    )
    max_model_len: Annotated[int, Field(ge=0, le=10_000_000)] = Field(
        default=0, description="Longest prompt plus output in tokens; 0: the model's own limit."
    )


class KvCache(Model):
    """The one memory pool that all requests of a replica share."""

    memory: OptionalQuantity = Field(
        default="", description="Pool size, for example 256Mi; empty: the engine's own choice."
    )
    block_size: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0, description="Tokens in one block; 0: the engine's own, 16 on cpu, 64 on a GPU."
    )
    prefix_caching: bool = Field(
        default=True, description="Share blocks of equal prompt beginnings."
    )
    host_offload: OptionalQuantity = Field(
        default="",
        description="Host memory for evicted prefixes, within resources.memory; empty: none.",
    )


class Resources(Model):
    """What one replica asks of its node, beside accelerators."""

    cpu: Quantity = Field(
        default="1", description="CPU request; on vendor cpu also the number of threads."
    )
    memory: Quantity = Field(default="2Gi", description="Memory request and limit.")


class EngineSpec(Model):
    """How the engine of each replica runs."""

    image: Annotated[str, Field(max_length=512)] = Field(
        default="", description="Image of the worker; empty: the operator's default."
    )
    args: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=64)] = Field(
        default_factory=list, description="More flags for the worker, after the rendered ones."
    )
    kv_cache: KvCache = Field(default_factory=KvCache, description="The KV pool.")
    max_batch_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        default=2048, description="Most tokens computed in one step."
    )
    max_concurrent: Annotated[int, Field(ge=1, le=65_536)] = Field(
        default=256, description="Most requests that run at the same time on one replica."
    )
    resources: Resources = Field(
        default_factory=Resources, description="CPU and memory of one replica."
    )


class ScaleUp(Model):
    """How fast a fleet may grow."""

    max_step_percent: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=200, description="Most growth of one decision, in percent of the fleet."
    )
    max_step_pods: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = Field(
        default=8, description="Most growth of one decision, in replicas."
    )


class ScaleDown(Model):
    """How slowly a fleet shrinks."""

    window: Duration = Field(
        default="60s", description="The fleet fits the largest demand of this time."
    )
    step_percent: Annotated[int, Field(ge=1, le=100)] = Field(
        default=25, description="Most shrinking of one step, in percent; at least one replica."
    )
    interval: Duration = Field(default="30s", description="Least time between two steps down.")

    @model_validator(mode="after")
    def _window_remembered(self) -> ScaleDown:
        if seconds(self.window) > seconds(MAX_WINDOW):
            raise ValueError(f"window: {self.window} is longer than {MAX_WINDOW}")
        return self


class Autoscaling(Model):
    """How many replicas: as written, or as measured load needs."""

    mode: Literal["Manual", "Auto"] = Field(
        default="Auto",
        description="Manual: spec.replicas. Auto: measured load, between min and max;"
        " spec.replicas is then neither read nor written.",
    )
    min_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = Field(
        default=1, description="Least replicas in Auto."
    )
    max_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = Field(
        default=4, description="Most replicas in Auto."
    )
    target_utilization: Fraction = Field(
        default="0.85", description="Wanted share of the learned capacity, above 0 and at most 1."
    )
    scale_up: ScaleUp = Field(default_factory=ScaleUp, description="Limits of growth.")
    scale_down: ScaleDown = Field(default_factory=ScaleDown, description="Limits of shrinking.")

    @model_validator(mode="after")
    def _bounds(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"minReplicas: {self.min_replicas} exceeds maxReplicas {self.max_replicas}; lower"
                " minReplicas or raise maxReplicas"
            )
        if not 0.0 < float(self.target_utilization) <= 1.0:
            raise ValueError(
                f"targetUtilization: {self.target_utilization} is not above 0 and at most 1"
            )
        return self


class Drain(Model):
    """How a replica that leaves finishes its requests."""

    timeout: Duration = Field(
        default="300s", description="Longest wait for running requests before they are cut."
    )


class Rollout(Model):
    """How a new revision replaces the old one."""

    max_surge: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = Field(
        default=1, description="Replicas above the wanted number during a rollout."
    )
    max_unavailable: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = Field(
        default=0, description="Replicas below the wanted number during a rollout."
    )
    drain: Drain = Field(default_factory=Drain, description="Finishing requests.")
    revision_history_limit: Annotated[int, Field(ge=0, le=100)] = Field(
        default=10, description="Earlier revisions that are kept to go back to."
    )
    progress_deadline: Duration = Field(
        default="15m",
        description="Longest time without another ready replica of the new revision; then the"
        " rollout stops, and old replicas that serve stay.",
    )

    @model_validator(mode="after")
    def _room(self) -> Rollout:
        if self.max_surge + self.max_unavailable < 1:
            raise ValueError(
                f"maxSurge: {self.max_surge} and maxUnavailable {self.max_unavailable} leave no"
                " room for a rollout; raise one of them"
            )
        return self


class Monitoring(Model):
    """What is set up for the fleet's metrics."""

    pod_monitor: Literal["auto", "disabled"] = Field(
        default="auto",
        description="auto: a PodMonitor when the cluster has them, for the Prometheus operator.",
    )


class Spec(Model):
    """What the user wants."""

    model: ModelSpec = Field(description="The checkpoint.")
    engine: EngineSpec = Field(default_factory=EngineSpec, description="The engine.")
    accelerator: AcceleratorSpec = Field(
        default_factory=AcceleratorSpec, description="Devices and nodes."
    )
    replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = Field(
        default=1, description="Replicas in mode Manual; the operator never writes it."
    )
    autoscaling: Autoscaling = Field(default_factory=Autoscaling, description="Fleet size.")
    rollout: Rollout = Field(default_factory=Rollout, description="Replacing revisions.")
    capacity: Capacity = Field(
        default_factory=Capacity, description="Dealings with node autoscalers."
    )
    monitoring: Monitoring = Field(default_factory=Monitoring, description="Metrics.")
    paused: bool = Field(default=False, description="Change no pods; only report.")


@dataclass(frozen=True)
class InferenceDeployment:
    """One parsed object. `status` is the raw dictionary that the API server holds; not mutated."""

    namespace: str
    name: str
    uid: str
    generation: int
    spec: Spec
    status: Mapping[str, Any] = field(default_factory=dict)
    deleting: bool = False

    @property
    def served_name(self) -> str:
        """Model name that clients ask for."""
        return self.spec.model.name or self.name

    @property
    def service_account(self) -> str:
        """Name of the pods' ServiceAccount; not the fleet's own, which may be `default`."""
        return f"{self.name}-worker"


def parse(obj: Mapping[str, Any]) -> InferenceDeployment:
    """The typed form of a Kubernetes object.

    Raises SpecInvalid with every problem, each naming field, value and rule.
    """
    metadata = obj.get("metadata") or {}
    name = str(metadata.get("name") or "")
    problems = _identity_problems(obj, name)
    spec: Spec | None = None
    try:
        spec = Spec.model_validate(obj.get("spec") or {})
    except ValidationError as error:
        problems += [_sentence(detail) for detail in error.errors()]
    if problems or spec is None:
        raise SpecInvalid(name, problems)
    return InferenceDeployment(
        namespace=str(metadata.get("namespace") or "default"),
        name=name,
        uid=str(metadata.get("uid") or ""),
        generation=int(metadata.get("generation") or 0),
        spec=spec,
        status=obj.get("status") or {},
        deleting=metadata.get("deletionTimestamp") is not None,
    )


def _identity_problems(obj: Mapping[str, Any], name: str) -> list[str]:
    problems = []
    if obj.get("apiVersion") != API_VERSION or obj.get("kind") != KIND:
        problems.append(
            f"apiVersion, kind: {obj.get('apiVersion')} {obj.get('kind')} is not"
            f" {API_VERSION} {KIND}"
        )
    if len(name) > MAX_NAME_LENGTH:
        problems.append(
            f"metadata.name: {name} has {len(name)} characters; at most {MAX_NAME_LENGTH}"
        )
    if not re.match(NAME_PATTERN, name):
        problems.append(
            f"metadata.name: {name!r} must start with a letter and hold only a-z, 0-9 and -"
        )
    return problems


def _sentence(detail: Mapping[str, Any]) -> str:
    """One problem of pydantic's as `spec.field: value: rule`."""
    path = ".".join(["spec", *(str(part) for part in detail["loc"])])
    if detail["type"] == "value_error":
        return f"{path}.{detail['ctx']['error']}"
    if detail["type"] == "missing":
        return f"{path}: is required"
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown field"
    return f"{path}: {detail['input']!r}: {detail['msg']}"
