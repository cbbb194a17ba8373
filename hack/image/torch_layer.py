"""Runs inside the image build: puts torch for the CPU into the image's environment, and proves it.

PyTorch's own CPU index gives the small build. Where that index cannot be reached, PyPI's build is
taken, which is the CUDA one on x86-64, and the parts that a CPU process never opens are left out:
they are loaded lazily (cuDNN's engines, cuSOLVER) or only by compilers. The large libraries that
libtorch_cuda.so names as needed, and never calls without a device, become stubs (elf_stub.py);
torch's own lose device code and symbol tables (elf_slim.py). 4.4 GB become 0.7 GB.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bytecode
import elf_slim
import elf_stub
from dependencies import HERE, install, site_packages

TORCH = "torch==2.15.0"
LOCK = HERE / "torch.txt"
# Not installed from PyPI at all: a CPU process compiles no kernel.
SKIPPED = ("triton", "cuda-bindings", "cuda-pathfinder", "nvidia-cuda-cccl")
# Deleted after the installation; checked by PROOF in the same step.
PRUNED = (
    "nvidia/cudnn/lib/libcudnn_*",
    "nvidia/cu*/lib/libcusolver*",
    "nvidia/cu*/lib/libnvperf*",
    "nvidia/**/*.a",
    "nvidia/**/*.bc",
    "nvidia/**/include",
    "torch/include",
    "torch/bin/protoc*",
    "torch/lib/libtorch_cuda_linalg.so",
)
LARGE_BYTES = 16_000_000  # smaller libraries, the CUDA runtime among them, stay as they are
PROOF = """
import torch, torch.nn.functional as F
a = torch.randn(64, 64)
assert torch.allclose(a @ torch.eye(64), a)
q = torch.randn(1, 4, 8, 16)
assert F.scaled_dot_product_attention(q, q, q, is_causal=True).isfinite().all()
assert torch.linalg.inv(torch.eye(8)).sum() == 8
assert torch.linalg.svdvals(a).isfinite().all()
assert (a.bfloat16() @ a.bfloat16()).isfinite().all()
assert F.conv2d(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3)).max() == 27
assert not torch.cuda.is_available()
torch.nn.Linear(64, 8)(a).sum().backward()
assert torch.fft.ifft(torch.fft.fft(a)).real.allclose(a, atol=1e-4)
import torch.distributed as d
d.init_process_group("gloo", store=d.HashStore(), rank=0, world_size=1)
d.all_reduce(a)
print("torch", torch.__version__, "on", torch.get_num_threads(), "threads: works")
"""


def pinned(lock: str, skipped: tuple[str, ...] = ()) -> str:
    """The requirements of a lock file without the packages named. Pure."""
    blocks = re.split(r"\n(?=[a-z0-9])", lock)
    return "\n".join(b for b in blocks if re.split(r"[=\s\[]", b, maxsplit=1)[0] not in skipped)


def from_cpu_index() -> bool:
    """PyTorch's CPU build; the versions of its dependencies are the lock's, torch's hash is not."""
    options = ("--torch-backend", "cpu", "--no-verify-hashes", "--constraint", str(LOCK))
    return install(*options, TORCH, UV_HTTP_RETRIES="1")


def from_pypi() -> bool:
    """PyPI's build with every hash checked, less what is never opened on a CPU."""
    chosen = Path("/tmp/torch-chosen.txt")
    chosen.write_text(pinned(LOCK.read_text(), SKIPPED))
    done = install("--no-deps", "--require-hashes", "-r", str(chosen))
    chosen.unlink()
    if done:
        prune(site_packages())
    return done


def prune(packages: Path) -> None:
    """Delete PRUNED below a site-packages folder; reduce the large libraries to what is used."""
    for pattern in PRUNED:
        for path in sorted(packages.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for pattern, reduce in (
        ("nvidia/**/lib/*.so*", elf_stub.replace),
        ("torch/lib/*.so", elf_slim.rewrite),
    ):
        for path in sorted(packages.glob(pattern)):
            if path.stat().st_size > LARGE_BYTES:
                saved = reduce(path)
                print(f"torch without a GPU: {path.name} {saved / -1e6:.0f} MB", flush=True)


def main(source: str) -> int:
    """Install, compile, prove; non-zero when no source served torch or the proof failed.

    source: cpu (PyTorch's index), pypi, or auto (the first, else the second).
    """
    if source not in ("auto", "cpu", "pypi"):
        print(f"TORCH_SOURCE is {source}; it must be auto, cpu or pypi", file=sys.stderr)
        return 2
    start = time.monotonic()
    done = source != "pypi" and from_cpu_index()
    if not done and source != "cpu":
        if source == "auto":
            print("PyTorch's CPU index cannot be reached: taking PyPI's CUDA build, pruned")
        done = from_pypi()
    if not done:
        print(f"{TORCH} could not be installed; the lines above say why", file=sys.stderr)
        return 1
    print(f"torch installed in {time.monotonic() - start:.0f} s", flush=True)
    bytecode.main([str(site_packages())])
    return subprocess.run([sys.executable, "-c", PROOF]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
