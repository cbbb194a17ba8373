"""InferenceDeployments for the end-to-end tests."""

from typing import Any

Json = dict[str, Any]


def merged(base: Json, more: Json) -> Json:
    """base with the values of `more`, folders merged; neither is changed."""
    result = dict(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def cpu_fleet(name: str, namespace: str, replicas: int = 1, spec: Json | None = None) -> Json:
    """A fixed number of small CPU replicas of the model inside the image."""
    base: Json = {
        "model": {"uri": "file:///models/tiny"},
        "accelerator": {"vendor": "cpu"},
        "engine": {
            "resources": {"cpu": "100m", "memory": "1Gi"},
            "kvCache": {"memory": "32Mi"},
        },
        "replicas": replicas,
        "autoscaling": {"mode": "Manual"},
        "rollout": {"drain": {"timeout": "60s"}},
    }
    return fleet(name, namespace, merged(base, spec or {}))


def amd_fleet(name: str, namespace: str, replicas: int, count: int) -> Json:
    """A fixed number of replicas with `count` MI300X each; on fake nodes no process runs."""
    spec: Json = {
        "model": {"uri": "hf://Qwen/Qwen3-8B"},
        "accelerator": {"vendor": "amd", "products": ["MI300X"], "count": count},
        "replicas": replicas,
        "autoscaling": {"mode": "Manual"},
        "rollout": {"drain": {"timeout": "1s"}},
    }
    return fleet(name, namespace, spec)


def fleet(name: str, namespace: str, spec: Json) -> Json:
    """The object around a spec."""
    return {
        "apiVersion": "tilefleet.io/v1alpha1",
        "kind": "InferenceDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }
