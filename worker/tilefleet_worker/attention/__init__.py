"""Attention over the paged KV cache: one Protocol, one backend a file, chosen by name."""

from importlib import import_module

from tilefleet_worker.attention.base import AttentionBackend
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.model_config import ModelConfig

# Lazy, so that what one backend cannot import breaks none of the others.
_BACKENDS = {
    "cpu": ("tilefleet_worker.attention.cpu", "CPUAttention"),
    "reference": ("tilefleet_worker.attention.reference", "ReferenceAttention"),
}


def create(name: str, config: ModelConfig) -> AttentionBackend:
    """Build a backend. Raises ConfigError with its reasons when it cannot serve the model."""
    if name not in _BACKENDS:
        raise ConfigError(f"backend is {name!r}: it must be one of {', '.join(sorted(_BACKENDS))}.")
    module, attribute = _BACKENDS[name]
    backend: AttentionBackend = getattr(import_module(module), attribute)(config)
    reasons = backend.why_not()
    if reasons:
        raise ConfigError(f"backend {name!r} cannot serve this model: {'; '.join(reasons)}.")
    return backend
