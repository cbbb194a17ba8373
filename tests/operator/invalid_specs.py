"""Specs that must be refused, by parse() and by the API server alike.

Each: id, the object's changes, and words that the message must hold: field, value and rule.
"""

from typing import Any

from tests.operator.builders import document

CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("uri-scheme", {"model": {"uri": "ftp://host/model"}},
     ("model.uri", "ftp://host/model", "hf|pvc|file")),
    ("uri-missing", {"model": {}}, ("model.uri", "equired")),
    ("replicas-negative", {"replicas": -1}, ("replicas", "-1", "0")),
    ("replicas-type", {"replicas": "three"}, ("replicas", "three", "integer")),
    ("bounds", {"autoscaling": {"minReplicas": 5, "maxReplicas": 2}},
     ("minReplicas: 5", "exceeds maxReplicas 2", "lower minReplicas or raise maxReplicas")),
    ("minimum-zero", {"autoscaling": {"minReplicas": 0}}, ("autoscaling.minReplicas", "0", "1")),
    ("target", {"autoscaling": {"targetUtilization": "1.5"}},
     ("targetUtilization: 1.5", "not above 0 and at most 1")),
    ("mode", {"autoscaling": {"mode": "Magic"}}, ("autoscaling.mode", "Magic", "Auto")),
    ("window", {"autoscaling": {"scaleDown": {"window": "1h"}}},
     ("window: 1h", "longer than 10m")),
    ("duration", {"rollout": {"drain": {"timeout": "soon"}}},
     ("drain.timeout", "soon", "ms|s|m|h")),
    ("no-room", {"rollout": {"maxSurge": 0, "maxUnavailable": 0}},
     ("maxSurge: 0", "maxUnavailable 0", "raise one of them")),
    ("vendor", {"accelerator": {"vendor": "tpu"}}, ("accelerator.vendor", "tpu", "cpu")),
    ("cpu-with-count", {"accelerator": {"vendor": "cpu", "count": 2}},
     ("count: 2", "vendor is cpu", "remove count")),
    ("cpu-with-products", {"accelerator": {"vendor": "cpu", "products": ["MI300X"]}},
     ("products: MI300X", "vendor is cpu", "remove them")),
    ("count-above", {"accelerator": {"count": 9}}, ("accelerator.count", "9", "8")),
    ("product", {"accelerator": {"products": ["H100"]}},
     ("accelerator.products", "H100", "MI300X")),
    ("cpu-with-fallbacks", {"accelerator": {"vendor": "cpu", "fallbacks": [{}]}},
     ("fallbacks", "vendor is cpu", "remove them")),
    ("count-over-partitions",
     {"accelerator": {"vendor": "amd", "count": 2, "partition": {"compute": "CPX"}}},
     ("count: 2", "mode CPX", "set count to 1 or compute to SPX")),
    ("fallback-over-partitions",
     {"accelerator": {"vendor": "amd", "count": 8,
                      "fallbacks": [{"partition": {"compute": "DPX"}}]}},
     ("spans partitions of mode DPX", "set count to 1 or compute to SPX")),
    ("nps4-without-cpx",
     {"accelerator": {"vendor": "amd", "products": ["MI300X"],
                      "partition": {"compute": "SPX", "memory": "NPS4"}}},
     ("compute SPX", "memory NPS4", "MI300X", "set compute to CPX")),
    ("resource-of-other-mode",
     {"accelerator": {"vendor": "amd", "resourceName": "amd.com/cpx_nps4",
                      "partition": {"compute": "SPX"}}},
     ("resourceName: amd.com/cpx_nps4", "partition.compute SPX", "change one")),
    ("resource-name", {"accelerator": {"vendor": "amd", "resourceName": "nvidia.com/gpu"}},
     ("accelerator.resourceName", "nvidia.com/gpu", "amd")),
    ("memory", {"engine": {"kvCache": {"memory": "lots"}}}, ("kvCache.memory", "lots", "Gi")),
    ("unknown-field", {"speed": "max"}, ("spec.speed", "unknown field")),
    ("unknown-nested", {"engine": {"turbo": True}}, ("spec.engine.turbo", "unknown field")),
]  # fmt: skip

NAMES: list[tuple[str, str, tuple[str, ...]]] = [
    ("name-long", "a" * 49, ("metadata.name", "a" * 49, "48")),
    ("name-digit", "7b", ("metadata.name", "7b", "start with a letter")),
    ("name-dot", "llama.70b", ("metadata.name", "llama.70b", "a-z, 0-9 and -")),
]


def objects() -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """(id, object, words) of every case."""
    specs = [(case, document(**spec), words) for case, spec, words in CASES]
    return specs + [(case, document(name), words) for case, name, words in NAMES]
