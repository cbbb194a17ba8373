"""Everything the engine can be told, frozen and resolved once."""

from dataclasses import dataclass, replace

from tilefleet_worker.errors import ConfigError

BACKENDS = ("auto", "cpu", "reference", "triton")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CPU_KV_CACHE_BYTES = 256 * 2**20
# Tokens of a block. On a GPU an attention tile then lies in one block: one table look-up a tile.
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 16, 64


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of the engine. `auto` and 0 mean "decide at start"; `resolve` removes them."""

    backend: str = "auto"
    """cpu (fast path), reference (slow oracle) or triton (GPU). auto: triton on a GPU, else cpu."""
    dtype: str = "auto"
    """Type of weights, activations and KV cache. auto: bfloat16 on a GPU. On CPU always fp32: bf16
    is 470 times slower on AVX2."""
    kv_cache_bytes: int = 0
    """Memory of the KV cache, allocated once at start. 0: 256 MiB on a CPU; on a GPU what
    gpu_memory_fraction leaves, measured after the weights."""
    kv_offloading_bytes: int = 0
    """Host memory for KV blocks of evicted prefixes, which are copied back when they are hit again.
    0: evicted is forgotten. For backend cpu it is the same memory as the pool: of use to tests."""
    gpu_memory_fraction: float = 0.92
    """Share of a GPU's memory that all of this process may take when kv_cache_bytes is 0."""
    block_size: int = 0
    """Tokens of one KV block: the unit of allocation and of prefix sharing. 0: 16, on a GPU 64."""
    prefix_caching: bool = True
    """Reuse the KV blocks of equal prefixes."""
    batch_invariant: bool = True
    """On a GPU: decodes of up to 256 rows get the bits they get alone; costs time above 32."""
    max_batch_tokens: int = 2048
    """Tokens computed in one step, prompts and decodes together: bounds the step's time."""
    max_concurrent: int = 256
    """Requests that hold KV blocks at the same time."""
    max_waiting: int = 1024
    """Requests that may queue; one more is answered 429."""
    max_model_len: int = 0
    """Tokens of prompt and answer together. 0: what the model was trained for."""
    speculative_ngram: int = 0
    """Most draft tokens that a step checks for a request, found in its own text; 0: none."""
    tensor_parallel: int = 1
    """Processes that share the model, one a GPU: each holds a part of every layer and of the pool.
    """
    threads: int = 0
    """Compute threads of all processes together. 0: leave the framework's default."""
    stall_seconds: float = 60.0
    """Work is queued and no step finished for this long: the watchdog calls it a stall."""

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("dtype", self.dtype, DTYPES)
        for name in ("max_batch_tokens", "max_concurrent", "tensor_parallel"):
            _at_least(name, getattr(self, name), 1)
        for name in ("kv_cache_bytes", "block_size", "max_waiting", "max_model_len", "threads",
                     "speculative_ngram", "kv_offloading_bytes"):  # fmt: skip
            _at_least(name, getattr(self, name), 0)
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            raise ConfigError(
                f"gpu_memory_fraction is {self.gpu_memory_fraction}: it must be above 0 and at "
                "most 1."
            )
        if self.kv_offloading_bytes and not self.prefix_caching:
            raise ConfigError(
                f"kv_offloading_bytes is {self.kv_offloading_bytes}, but without prefix caching "
                "there is nothing to keep: drop --kv-offloading-size or --no-prefix-caching."
            )
        if self.kv_offloading_bytes and self.tensor_parallel > 1:
            raise ConfigError(
                f"kv_offloading_bytes is {self.kv_offloading_bytes}, but the ranks of a model keep "
                "no prefixes in host memory: drop --kv-offloading-size or --tensor-parallel-size."
            )
        if self.stall_seconds <= 0:
            raise ConfigError(f"stall_seconds is {self.stall_seconds}: it must be above 0.")

    def resolve(self, *, model_max_len: int, gpu: bool = False) -> "EngineConfig":
        """Return a copy without any auto; on a GPU kv_cache_bytes may stay 0, to be measured.

        model_max_len: positions the model was trained for. gpu: the process has one. Raises
        ConfigError when the model is shorter than asked, or the dtype is not the backend's.
        """
        if self.max_model_len > model_max_len:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, but the model supports {model_max_len} "
                "positions: lower it, or use 0 for the model's own limit."
            )
        backend = self.backend
        if backend == "auto":
            backend = "triton" if gpu else "cpu"
        on_gpu = backend == "triton"
        if not on_gpu and self.dtype not in ("auto", "float32"):
            raise ConfigError(
                f"dtype is {self.dtype!r}, but backend {backend!r} computes in float32 only: use "
                "dtype auto, or backend triton on a GPU."
            )
        if on_gpu and self.speculative_ngram:
            raise ConfigError(
                f"speculative_ngram is {self.speculative_ngram}, but backend 'triton' checks no "
                "drafts yet: leave --speculative-ngram out, or use --backend cpu."
            )
        return replace(
            self,
            backend=backend,
            dtype=("bfloat16" if on_gpu else "float32") if self.dtype == "auto" else self.dtype,
            kv_cache_bytes=self.kv_cache_bytes or (0 if on_gpu else CPU_KV_CACHE_BYTES),
            block_size=self.block_size or (GPU_BLOCK_SIZE if on_gpu else CPU_BLOCK_SIZE),
            max_model_len=self.max_model_len or model_max_len,
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}.")


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{name} is {value}: it must be at least {minimum}.")
