"""Kernels compiled ahead, without a GPU, under the keys that a start looks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilefleet_worker.__main__ import main
from tilefleet_worker.kernel_cache import adopt

pytestmark = pytest.mark.kernels

MODEL = Path(__file__).parents[2] / "examples" / "tiny-model" / "model"
SIZES = ["--max-model-len", "64", "--max-batch-tokens", "32", "--max-concurrent", "2"]


def built(cache: Path) -> tuple[int, int]:
    """Kernels needed and compiled, of a fresh process: this one may have Triton's interpreter."""
    command = [sys.executable, "-m", "tilefleet_worker", "kernels", "build", "--arch", "gfx942"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [*command, "--model", str(MODEL), "--cache", str(cache), *SIZES],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    words = run.stdout.split(": ")[1].split()
    assert words[1::2][:2] == ["kernels,", "compiled,"]
    return int(words[0]), int(words[2])


@pytest.mark.timeout(900)
def test_what_was_built_is_not_compiled_again(tmp_path: Path) -> None:
    """Steps of the engine itself, with a pool of 16 GiB: AMD's compiler sees its size."""
    needed, compiled = built(tmp_path)
    assert needed >= compiled > 3
    binaries = list(tmp_path.glob("*/*.hsaco"))
    assert {path.stem for path in binaries} >= {
        "few_rows_kernel", "paged_decode_kernel", "paged_prefill_kernel", "rotary_store_kernel",
    }  # fmt: skip
    assert len(binaries) == compiled
    assert built(tmp_path) == (needed, 0)


def test_shipped_kernels_are_copied_once_and_never_overwrite(tmp_path: Path) -> None:
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    for name in ("a", "b"):
        (shipped / name).mkdir(parents=True)
        (shipped / name / "kernel.hsaco").write_text("shipped")
    (cache / "b").mkdir(parents=True)
    (cache / "b" / "kernel.hsaco").write_text("own")
    environment = {"TILEFLEET_KERNELS": str(shipped), "TRITON_CACHE_DIR": str(cache)}
    assert (adopt(environment), adopt(environment)) == (1, 0)
    assert (cache / "a" / "kernel.hsaco").read_text() == "shipped"
    assert (cache / "b" / "kernel.hsaco").read_text() == "own"
    assert sorted(path.name for path in cache.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("missing", ["TILEFLEET_KERNELS", "TRITON_CACHE_DIR"])
def test_without_an_image_nothing_is_adopted(tmp_path: Path, missing: str) -> None:
    environment = {"TILEFLEET_KERNELS": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    del environment[missing]
    assert adopt(environment) == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no cache: give --cache FOLDER, or set TRITON_CACHE_DIR"),
        (("--cache", "CACHE", "--model", "gpt-9"), "'gpt-9' is neither a folder with a config"),
    ],
)
def test_a_wrong_argument_is_answered_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    arguments: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    where = [str(tmp_path) if word == "CACHE" else word for word in arguments]
    assert main(["kernels", "build", *where]) == 2
    assert said in capsys.readouterr().err
