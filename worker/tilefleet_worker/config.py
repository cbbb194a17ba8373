"""The worker's configuration: flags in, one frozen value out, every "auto" resolved once.

Knows flags and arithmetic. Does not know torch, the model's files, clocks or sockets.
`ServeConfig` is the one source of flag names, defaults and help texts; the parser is built from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from tilefleet_worker import termination
from tilefleet_worker.engine_config import BACKENDS, DTYPES, EngineConfig
from tilefleet_worker.errors import ConfigError

TOOL_CALL_PARSERS = ("auto", "none", "hermes", "llama3_json", "mistral")
REASONING_PARSERS = ("auto", "none", "think")
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_DECIMAL: dict[str, int | Decimal] = {
    "m": Decimal("0.001"),
    "": 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
}
_QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d+)?(?:[eE]\d+)?)(?P<suffix>[KMGT]i|[mkKMGT])?")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_DURATION_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity: `268435456`, `256Mi`, `1.5Gi`, `2G`.

    Raises ConfigError for anything else, and for less than one byte.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size: write bytes or a quantity such as 256Mi or 2Gi")
    suffix = match["suffix"] or ""
    try:
        size = int(Decimal(match["number"]) * (_BINARY.get(suffix) or _DECIMAL[suffix]))
    except (ArithmeticError, ValueError) as error:
        raise ConfigError(f"{text!r} is not a size: the number is out of range") from error
    if size < 1:
        raise ConfigError(f"{text!r} is not a size: it must be at least 1 byte")
    return size


def parse_duration(text: str) -> float:
    """Seconds of a duration: `300s`, `5m`, `1m30s`, `250ms`, or plain seconds `2.5`.

    Raises ConfigError for anything else.
    """
    stripped = text.strip()
    if re.fullmatch(r"\d+(?:\.\d+)?", stripped):
        return float(stripped)
    parts = _DURATION_PART.findall(stripped)
    if not parts or "".join(number + unit for number, unit in parts) != stripped:
        raise ConfigError(f"{text!r} is not a duration: write for example 300s, 5m or 250ms")
    return sum(float(number) * _DURATION_SECONDS[unit] for number, unit in parts)


def _whole(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text) or not minimum <= int(text) <= maximum:
            raise ConfigError(f"{text!r} must be a whole number from {minimum} to {maximum}")
        return int(text)

    return parse


def _share(text: str) -> float:
    if not re.fullmatch(r"0?\.\d{1,6}|1(\.0{1,6})?", text) or float(text) == 0.0:
        raise ConfigError(f"{text!r} must be a share above 0 and at most 1, for example 0.9")
    return float(text)


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ConfigError(f"{text!r} must be one of {', '.join(choices)}")
        return text

    return parse


def _text(text: str) -> str:
    if not text.strip():
        raise ConfigError("the value is empty: give one or leave the flag out")
    return text


def _option(default: Any, flag: str, metavar: str, parse: Callable[[str], Any], help_: str) -> Any:
    """One field of ServeConfig: its flag, its parser and the text that --help prints."""
    metadata = {"flag": flag, "metavar": metavar, "parse": parse, "help": help_}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything `serve` can be told. Each field's text (unit and reason) is its --help line.

    Fields may hold "auto" or 0 for "decide at start" until `resolve` returned a config without any.
    """

    model: str = _option(
        dataclasses.MISSING, "--model", "URI", _text,
        "model folder in Hugging Face layout: file:///path, a bare path, pvc://claim/path (read at "
        "/models/path) or hf://org/name[@revision]",
    )  # fmt: skip
    served_model_name: str = _option(
        "", "--served-model-name", "NAME", _text,
        "name that clients put into `model`; default: the last part of --model",
    )  # fmt: skip
    max_model_len: int = _option(
        0, "--max-model-len", "TOKENS", _whole(0, 10_000_000),
        "most tokens of prompt plus answer of one request; 0 = what the model was trained for",
    )  # fmt: skip
    backend: str = _option(
        "auto", "--backend", "NAME", _one_of(BACKENDS),
        "cpu, triton (GPU), reference (slow oracle) or auto: triton if torch sees a GPU, else cpu",
    )  # fmt: skip
    dtype: str = _option(
        "auto", "--dtype", "NAME", _one_of(DTYPES),
        "number format of weights and KV: auto is bfloat16 on a GPU; a cpu takes float32 only",
    )  # fmt: skip
    kv_cache_memory: int = _option(
        0, "--kv-cache-memory", "SIZE", parse_quantity,
        "bytes of the KV pool, allocated once at start, as a number or a quantity (256Mi, 4Gi); "
        "default: 256Mi, on a GPU what --gpu-memory-fraction leaves",
    )  # fmt: skip
    gpu_memory_fraction: float = _option(
        0.92, "--gpu-memory-fraction", "SHARE", _share,
        "share of the GPU's memory for weights, scratch and KV pool, without --kv-cache-memory",
    )  # fmt: skip
    kv_offloading_size: int = _option(
        0, "--kv-offloading-size", "SIZE", parse_quantity,
        "bytes of host memory, pinned at start, that keep KV blocks of evicted prefixes until they "
        "are hit again; a number of bytes or a quantity; default: none",
    )  # fmt: skip
    block_size: int = _option(
        0, "--block-size", "TOKENS", _whole(1, 1024),
        "tokens in one KV block; smaller wastes less at the end of a sequence, larger is cheaper; "
        "default: 16, on a GPU 64",
    )  # fmt: skip
    prefix_caching: bool = _option(
        True, "--no-prefix-caching", "", _text,
        "do not reuse KV blocks of equal prompt beginnings (reuse is on by default)",
    )  # fmt: skip
    batch_invariant: bool = _option(
        True, "--no-batch-invariance", "", _text, "on a GPU, take faster products above 32 rows, "
        "where tokens may then depend on the batch")  # fmt: skip
    max_batch_tokens: int = _option(
        2048, "--max-batch-tokens", "TOKENS", _whole(1, 1_048_576),
        "most tokens computed in one step; bounds how long a step, and so a stream's pause, can be",
    )  # fmt: skip
    max_concurrent: int = _option(
        256, "--max-concurrent", "REQUESTS", _whole(1, 65_536),
        "most requests that decode at the same time; more wait in the queue",
    )  # fmt: skip
    speculative_ngram: int = _option(
        0, "--speculative-ngram", "TOKENS", _whole(0, 64),
        "most tokens that a step guesses for a request, from what followed the same words before; "
        "answers stay the same; 0 = guess none; cpu and reference backends",
    )  # fmt: skip
    tensor_parallel_size: int = _option(
        1, "--tensor-parallel-size", "N", _whole(1, 8),
        "processes that share the model, one a GPU; on CPUs they share --threads. N must divide "
        "its heads and inner features; --kv-cache-memory is that of all of them",
    )  # fmt: skip
    host: str = _option(
        "0.0.0.0", "--host", "ADDRESS", _text, "address that both ports listen on"
    )  # fmt: skip
    port: int = _option(
        8000, "--port", "PORT", _whole(0, 65_535), "port of the OpenAI API; 0 = any free one"
    )  # fmt: skip
    admin_port: int = _option(
        8001, "--admin-port", "PORT", _whole(0, 65_535),
        "port of probes, metrics, stats and drain, for the pod network only; 0 = any free one",
    )  # fmt: skip
    cache_dir: str = _option(
        "/var/lib/tilefleet", "--cache-dir", "PATH", _text,
        "folder for downloaded models (hf:// only); survives restarts if it is a volume",
    )  # fmt: skip
    hf_endpoint: str = _option(
        "", "--hf-endpoint", "URL", _text,
        "address of the model hub or a mirror for hf://; default: the hub library's own",
    )  # fmt: skip
    drain_timeout: float = _option(
        300.0, "--drain-timeout", "DURATION", parse_duration,
        "longest wait for running requests at SIGTERM or /drain, for example 300s or 5m; what "
        "still runs then is ended with an error event",
    )  # fmt: skip
    removal_delay: float = _option(
        15.0, "--removal-delay", "DURATION", parse_duration,
        "time in which a draining worker still accepts requests, because routers learn late that "
        "it is not ready",
    )  # fmt: skip
    api_key_file: str = _option(
        "", "--api-key-file", "PATH", _text,
        "file with one API key a line (`KEY` or `ID KEY [OPTION...]`; options: max_inflight=N, "
        "tokens_per_minute=N, priority=N, salt=NAME), re-read when it changes; without the flag "
        "the API is open",
    )  # fmt: skip
    metrics_on_api_port: bool = _option(
        False, "--metrics-on-api-port", "", _text,
        "also answer /metrics, without a key, on the API port, where routers of the Gateway API "
        "Inference Extension scrape; then route only /v1 to clients",
    )  # fmt: skip
    tool_call_parser: str = _option(
        "auto", "--tool-call-parser", "NAME", _one_of(TOOL_CALL_PARSERS),
        "convention of the model's tool calls: hermes (Qwen too), llama3_json, mistral, none, or "
        "auto, which looks for their markers in the chat template",
    )  # fmt: skip
    reasoning_parser: str = _option(
        "auto", "--reasoning-parser", "NAME", _one_of(REASONING_PARSERS),
        "think splits <think> ... </think> off as reasoning_content; none leaves it in the text; "
        "auto looks for the markers in the chat template",
    )  # fmt: skip
    threads: int = _option(
        0, "--threads", "N", _whole(0, 4096),
        "compute threads of the cpu backend; 0 = the cgroup's CPU limit, else all cores",
    )  # fmt: skip

    def model_name(self) -> str:
        """The name that clients use: `--served-model-name`, else the last part of `--model`."""
        if self.served_model_name:
            return self.served_model_name
        path = re.sub(r"@[^/@]*$", "", self.model) if self.model.startswith("hf://") else self.model
        if path.startswith("hf://"):
            return path.removeprefix("hf://")
        return path.rstrip("/").rsplit("/", 1)[-1] or path


def engine_config(config: ServeConfig, *, num_cpus: int) -> EngineConfig:
    """The engine's part of the config. num_cpus: cores this process may use, >= 1. Pure."""
    return EngineConfig(
        backend=config.backend,
        dtype=config.dtype,
        kv_cache_bytes=config.kv_cache_memory,
        kv_offloading_bytes=config.kv_offloading_size,
        gpu_memory_fraction=config.gpu_memory_fraction,
        block_size=config.block_size,
        prefix_caching=config.prefix_caching,
        batch_invariant=config.batch_invariant,
        max_batch_tokens=config.max_batch_tokens,
        max_concurrent=config.max_concurrent,
        speculative_ngram=config.speculative_ngram,
        tensor_parallel=config.tensor_parallel_size,
        max_model_len=config.max_model_len,
        threads=config.threads or max(1, num_cpus),
    )


def resolve(
    config: ServeConfig, engine: EngineConfig, conventions: tuple[str, str] = ("none", "none")
) -> ServeConfig:
    """A new config without "auto" or 0: what the worker really does, shown at /stats. Pure.

    engine: the options of the running engine. conventions: what auto found for --tool-call-parser
    and --reasoning-parser.
    """
    return dataclasses.replace(
        config,
        served_model_name=config.model_name(),
        max_model_len=engine.max_model_len,
        backend=engine.backend,
        dtype=engine.dtype,
        kv_cache_memory=engine.kv_cache_bytes,
        block_size=engine.block_size,
        threads=engine.threads,
        tool_call_parser=conventions[0],
        reasoning_parser=conventions[1],
    )


def usable_cpus(host_cpus: int, cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: the cgroup v2 or v1 CPU limit, rounded up, at most host_cpus.

    More threads than the limit are throttled together, which is slower than fewer threads.
    """
    limit = _cgroup_limit(cgroup_root)
    return max(1, host_cpus if limit is None else min(host_cpus, -int(-limit // 1)))


def _cgroup_limit(root: Path) -> float | None:
    for quota_file, period_file in (
        ("cpu.max", None),
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
    ):
        try:
            words = (root / quota_file).read_text().split()
            if period_file is not None:
                words.append((root / period_file).read_text().strip())
            if words[0] not in ("max", "-1"):
                return int(words[0]) / int(words[1])
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with status 2, the message, and the command that explains the flags."""
        termination.write(ConfigError(message))
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help`.\n")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of ServeConfig."""
    for item in dataclasses.fields(ServeConfig):
        meta = item.metadata
        if isinstance(item.default, bool):
            action = "store_false" if item.default else "store_true"
            parser.add_argument(meta["flag"], dest=item.name, action=action, help=meta["help"])
            continue
        required = item.default is dataclasses.MISSING
        shown = "" if required or item.default in ("", 0) else f" (default: {item.default})"
        parser.add_argument(
            meta["flag"],
            dest=item.name,
            metavar=meta["metavar"],
            required=required,
            default=argparse.SUPPRESS,
            type=_argument_type(meta["parse"]),
            help=(meta["help"] + shown).replace("%", "%%"),
        )


def _argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def parser(prog: str = "python -m tilefleet_worker serve") -> argparse.ArgumentParser:
    """The parser of `serve`. Abbreviated flags are refused, as unknown ones are."""
    description = (
        "Serve one model over an OpenAI-compatible API (port 8000) and an admin port (8001)."
    )
    built = _Parser(prog=prog, description=description, allow_abbrev=False)
    add_flags(built)
    return built


def parse_args(argv: Sequence[str]) -> ServeConfig:
    """The config of the flags after `serve`.

    Ends the process with status 2 and a message that names the flag, as argparse does.
    """
    return ServeConfig(**vars(parser().parse_args(list(argv))))
