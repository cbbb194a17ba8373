"""The part of the spec that says which devices a replica needs and which nodes may carry it.

Every rule stands twice: here as a validator, and in rules.py as CEL for the API server.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tilefleet_operator.fields import Model

MAX_DEVICES_PER_POD = 8
RESOURCE_NAME_PATTERN = r"^(amd\.com/(gpu|(spx|dpx|tpx|qpx|cpx)_nps[1248]))?$"
WHOLE_GPU = ("Any", "SPX")

Product = Literal["MI210", "MI250X", "MI300A", "MI300X", "MI308X", "MI325X", "MI350X", "MI355X"]
Products = Annotated[list[Product], Field(max_length=16)]
DeviceIds = Annotated[
    list[Annotated[str, Field(pattern=r"^[0-9a-f]{4}$", max_length=4)]], Field(max_length=32)
]
Count = Annotated[int, Field(ge=0, le=MAX_DEVICES_PER_POD)]


class Toleration(Model):
    """A Kubernetes toleration."""

    key: Annotated[str, Field(max_length=317)] = Field(default="", description="Taint key.")
    operator: Literal["Exists", "Equal"] = Field(default="Exists", description="Comparison.")
    value: Annotated[str, Field(max_length=63)] = Field(default="", description="Taint value.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        default="", description="Taint effect; empty: all."
    )


class Partition(Model):
    """Modes that the GPUs must be in already; nobody is asked to repartition."""

    compute: Literal["Any", "SPX", "DPX", "TPX", "QPX", "CPX"] = Field(
        default="Any", description="Compute partition mode of the GPU."
    )
    memory: Literal["Any", "NPS1", "NPS2", "NPS4", "NPS8"] = Field(
        default="Any", description="Memory partition mode of the GPU."
    )


class Fallback(Model):
    """Devices that will do where the ones before find no room."""

    products: Products = Field(default_factory=list, description="AMD products; empty: any.")
    device_ids: DeviceIds = Field(
        default_factory=list, alias="deviceIDs", description="PCI device ids; overrides products."
    )
    count: Count = Field(default=0, description="Devices of one replica; 0: as accelerator.count.")
    partition: Partition = Field(default_factory=Partition, description="Partition modes.")


class AcceleratorSpec(Model):
    """The devices of one replica, and the nodes that may carry it."""

    vendor: Literal["amd", "cpu"] = Field(default="amd", description="Kind of device.")
    products: Products = Field(
        default_factory=list, description="AMD products that may be used; empty: any."
    )
    device_ids: DeviceIds = Field(
        default_factory=list,
        alias="deviceIDs",
        description="PCI device ids that may be used, for example 74a1; overrides products.",
    )
    count: Count = Field(
        default=0, description="Devices of one replica; 0: one on amd, none on cpu."
    )
    partition: Partition = Field(
        default_factory=Partition, description="Partition modes that the GPUs must be in."
    )
    resource_name: Annotated[str, Field(pattern=RESOURCE_NAME_PATTERN, max_length=32)] = Field(
        default="",
        description="Resource that a replica asks for, for example amd.com/cpx_nps4; empty: what"
        " the nodes offer. Name it where a node autoscaler starts from no node.",
    )
    fallbacks: Annotated[list[Fallback], Field(max_length=4)] = Field(
        default_factory=list, description="What will do instead, in order; the first that fits."
    )
    packing: Literal["Pack", "Spread"] = Field(
        default="Pack",
        description="Pack: fill a node before the next, so that whole nodes stay free. Spread: as"
        " the scheduler likes. A preference, never a requirement.",
    )
    node_selector: Annotated[
        dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)
    ] = Field(default_factory=dict, description="Node labels that must be equal.")
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(
        default_factory=list, description="Beside amd.com/gpu Exists, which amd always has."
    )

    @model_validator(mode="after")
    def _cpu_has_no_devices(self) -> AcceleratorSpec:
        if self.vendor == "cpu" and self.count != 0:
            raise ValueError(
                f"count: {self.count} needs devices, but vendor is cpu; remove count or set vendor"
                " to amd"
            )
        if self.vendor == "cpu" and (self.products or self.device_ids):
            named = ",".join([*self.products, *self.device_ids])
            raise ValueError(
                f"products: {named} names GPUs, but vendor is cpu; remove them or set vendor to amd"
            )
        if self.vendor == "cpu" and (self.fallbacks or self.resource_name):
            raise ValueError(
                f"fallbacks, resourceName: {self.resource_name} name GPUs, but vendor is cpu;"
                " remove them or set vendor to amd"
            )
        return self

    @model_validator(mode="after")
    def _partitions(self) -> AcceleratorSpec:
        for choice in self.choices:
            compute, memory = choice.partition.compute, choice.partition.memory
            if choice.count > 1 and compute not in WHOLE_GPU:
                # Tensor parallelism across CPX partitions gave garbage (vllm#20125).
                raise ValueError(
                    f"count: {choice.count} spans partitions of mode {compute}, which gives wrong"
                    " results; set count to 1 or compute to SPX"
                )
            if memory == "NPS4" and "MI300X" in choice.products and compute not in ("Any", "CPX"):
                raise ValueError(
                    f"partition: compute {compute} with memory NPS4 does not exist on MI300X; set"
                    " compute to CPX or memory to NPS1"
                )
        mode = self.resource_name.removeprefix("amd.com/").partition("_")[0].upper()
        if mode not in ("", "GPU", self.partition.compute) and self.partition.compute != "Any":
            raise ValueError(
                f"resourceName: {self.resource_name} is not of partition.compute"
                f" {self.partition.compute}; change one of them"
            )
        return self

    @property
    def devices(self) -> int:
        """Devices of one replica with the default resolved."""
        return 0 if self.vendor == "cpu" else (self.count or 1)

    @property
    def choices(self) -> tuple[Fallback, ...]:
        """What will do, in order, with counts resolved; the first is what the spec asks for."""
        own = Fallback(
            products=self.products,
            deviceIDs=self.device_ids,
            count=self.devices,
            partition=self.partition,
        )
        others = (f.model_copy(update={"count": f.count or own.count}) for f in self.fallbacks)
        return (own, *others)


class Balloon(Model):
    """Pods of a replica's shape, of lower priority, that hold warm places."""

    replicas: Annotated[int, Field(ge=0, le=100)] = Field(
        default=0, description="Places to hold; a replica takes one at once, and a node comes."
    )


class Capacity(Model):
    """How the fleet lives with the cluster's node autoscaler."""

    protect_startup: bool = Field(
        default=True, description="No node autoscaler moves a replica before it serves."
    )
    protect_serving: bool = Field(
        default=False,
        description="Nor afterwards. Else an eviction drains it, inside its PodDisruptionBudget.",
    )
    balloon: Balloon = Field(default_factory=Balloon, description="Warm places.")
