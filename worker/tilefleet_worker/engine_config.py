"""Everything the engine can be told, frozen and resolved once."""

from dataclasses import dataclass, replace

from tilefleet_worker.errors import ConfigError

BACKENDS = ("auto", "cpu", "reference")
DTYPES = ("auto", "float32")
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of the engine. `auto` and 0 mean "decide at start"; `resolve` removes them."""

    backend: str = "auto"
    """Attention backend: cpu (fast path) or reference (slow oracle)."""
    dtype: str = "auto"
    """Type of weights, activations and KV cache. On CPU fp32: bf16 is 470 times slower on AVX2."""
    kv_cache_bytes: int = 256 * _MIB
    """Memory of the KV cache, allocated once at start."""
    block_size: int = 16
    """Tokens of one KV block: the unit of allocation and of prefix sharing."""
    prefix_caching: bool = True
    """Reuse the KV blocks of equal prefixes."""
    max_batch_tokens: int = 2048
    """Tokens computed in one step, prompts and decodes together: bounds the step's time."""
    max_concurrent: int = 256
    """Requests that hold KV blocks at the same time."""
    max_waiting: int = 1024
    """Requests that may queue; one more is answered 429."""
    max_model_len: int = 0
    """Tokens of prompt and answer together. 0: what the model was trained for."""
    threads: int = 0
    """Compute threads. 0: leave the framework's default."""
    stall_seconds: float = 60.0
    """Work is queued and no step finished for this long: the watchdog calls it a stall."""

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("dtype", self.dtype, DTYPES)
        for name in ("kv_cache_bytes", "block_size", "max_batch_tokens", "max_concurrent"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_waiting", "max_model_len", "threads"):
            _at_least(name, getattr(self, name), 0)
        if self.stall_seconds <= 0:
            raise ConfigError(f"stall_seconds is {self.stall_seconds}: it must be above 0.")

    def resolve(self, *, model_max_len: int) -> "EngineConfig":
        """Return a copy without any auto. Raises ConfigError when the model is shorter than asked.

        model_max_len: positions the model was trained for.
        """
        if self.max_model_len > model_max_len:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, but the model supports {model_max_len} "
                "positions: lower it, or use 0 for the model's own limit."
            )
        return replace(
            self,
            backend="cpu" if self.backend == "auto" else self.backend,
            dtype="float32",
            max_model_len=self.max_model_len or model_max_len,
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}.")


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{name} is {value}: it must be at least {minimum}.")
