"""The resources that the operator touches, and the one place where names become API paths.

It does not know HTTP.
"""

import re
import urllib.parse
from dataclasses import dataclass

from tilefleet_operator.api import GROUP, KIND, PLURAL, VERSION
from tilefleet_operator.errors import ApiError

_SEGMENT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind as the API names it; ``group`` is empty for the core group."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """``v1`` or ``group/version``."""
        return f"{self.group}/{self.version}" if self.group else self.version


DEPLOYMENTS = Resource(GROUP, VERSION, PLURAL, KIND)
PODS = Resource("", "v1", "pods", "Pod")
SERVICES = Resource("", "v1", "services", "Service")
REVISIONS = Resource("apps", "v1", "controllerrevisions", "ControllerRevision")
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount")
BUDGETS = Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
MONITORS = Resource("monitoring.coreos.com", "v1", "podmonitors", "PodMonitor")
NODES = Resource("", "v1", "nodes", "Node", namespaced=False)
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
EVENTS = Resource("", "v1", "events", "Event")

CHILDREN = (SERVICES, SERVICE_ACCOUNTS, BUDGETS, POLICIES, REVISIONS)
"""Children beside pods that every cluster serves. MONITORS are served by some, and not watched."""

BY_KIND = {one.kind: one for one in (DEPLOYMENTS, PODS, *CHILDREN, MONITORS)}
"""What a plan may name."""


def path(resource: Resource, namespace: str | None, name: str | None) -> str:
    """The only place where names become a URL. Raises ApiError for what is no DNS-1123 name."""
    parts = ["apis", resource.group] if resource.group else ["api"]
    parts.append(resource.version)
    if resource.namespaced and namespace is not None:
        parts += ["namespaces", _segment(namespace)]
    parts.append(resource.plural)
    if name is not None:
        parts.append(_segment(name))
    return "/" + "/".join(parts)


def _segment(text: str) -> str:
    if not _SEGMENT.fullmatch(text) or ".." in text:
        raise ApiError(0, "BadName", f"{text!r} is not a DNS-1123 name and cannot be in a path")
    return urllib.parse.quote(text, safe="")
