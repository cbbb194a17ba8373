"""One builder per child object: what ought to exist for an InferenceDeployment.

Every builder returns a fresh dictionary for server-side apply; nothing is shared between children.
Does not know what exists.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """What the operator's flags supply to every deployment.

    worker_image: ROCm image, for vendor amd. worker_cpu_image: for vendor cpu.
    hf_endpoint: base URL of the model hub, None for the public one.
    image_pull_policy: empty leaves it to Kubernetes.
    """

    worker_image: str = ""
    worker_cpu_image: str = ""
    hf_endpoint: str | None = None
    image_pull_policy: str = ""
