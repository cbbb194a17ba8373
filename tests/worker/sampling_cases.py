"""Tokens chosen on the device against those of the host, in Triton's interpreter or on a GPU.

python sampling_cases.py [CASES] [cuda]. Without a GPU it needs TRITON_INTERPRET=1.
"""

import sys

import numpy as np
import torch

from tilefleet_worker.choice import draw
from tilefleet_worker.kernels.embedding import embed, embed_reference
from tilefleet_worker.kernels.sampling import WORDS, SamplerWorkspace, choose_tokens
from tilefleet_worker.request import SamplingParams
from tilefleet_worker.request_table import SAMPLER

# (vocabulary, chunk, capacity, deviation of logits, every how many kinds): candidates that reach
# and that do not, which is slow in the interpreter.
SMALL = ((300, 128, 512, 3.0, 1), (70, 32, 512, 0.0, 4), (70, 32, 8, 0.3, 3))
LARGE = (
    *((300, 32, 16, spread, 1) for spread in (0.0, 0.3, 3.0, 40.0)), (7, 8, 4, 1.0, 1),
    *((151936, 2048, 1024, spread, 1) for spread in (0.0, 1.0, 5.0)),
)  # fmt: skip
KINDS = (
    {"temperature": 0.0}, {}, {"temperature": 0.3}, {"temperature": 1e-30}, {"min_p": 0.2},
    {"min_p": 1.0}, {"top_k": 1}, {"top_k": 5}, {"top_k": 100}, {"top_p": 0.5}, {"top_p": 1e-6},
    {"top_p": 0.97}, {"top_k": 20, "top_p": 0.9}, {"top_k": 200, "top_p": 0.3, "min_p": 0.01},
    {"temperature": 100.0, "top_p": 0.99}, {"top_k": 2**31 - 1},
)  # fmt: skip


def rows_of(rng, vocab, count, spread):
    """Logits, some of them equal and some impossible."""
    logits = rng.normal(0, spread, (count, vocab)).astype(np.float32)
    logits[::3] = np.round(logits[::3])
    logits[1::4, : vocab // 2] = -np.inf
    return logits


def compare(rng, device, size):
    vocab, chunk, capacity, spread, stride = size
    kinds = KINDS[::stride]
    count = len(kinds)
    logits = rows_of(rng, vocab, count, spread)
    space = SamplerWorkspace(vocab, count, 2 * count, device, chunk=chunk, capacity=capacity)
    samples, want = np.zeros(count, SAMPLER), []
    places = rng.permutation(count)
    for row, kind in enumerate(kinds):
        params = SamplingParams(max_tokens=1, **kind)
        seed, position = int(rng.integers(0, 2**64, dtype=np.uint64)), int(rng.integers(1, 2**31))
        samples[row] = (
            count + row, places[row], position, params.top_k, params.temperature, params.top_p,
            params.min_p, seed,
        )  # fmt: skip
        values = logits[places[row]].astype(np.float64)
        with np.errstate(invalid="ignore"):
            want.append(draw(values, params, seed, position))
    got = chosen(logits, samples, space, device)
    if got != want:
        wrong = [(kinds[i], a, b) for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
        sys.exit(f"{size}: (kind, device, host) {wrong}")
    if space.newest[count:].tolist() != want:
        sys.exit("the newest tokens of the slots are others")
    space.newest.zero_()
    if chosen(logits, samples[3:5].copy(), space, device) != want[3:5]:
        sys.exit("a row's token depends on its batch-mates")
    if space.newest[: count + 3].any() or space.newest[count + 5 :].any():
        sys.exit("a token was kept for a slot of nobody")


def chosen(logits, samples, space, device):
    words = torch.from_numpy(samples.view(np.int32).reshape(-1, WORDS).copy()).to(device)
    return choose_tokens(torch.from_numpy(logits).to(device), words, space).tolist()


def broken(device):
    """NaN, infinity and nothing possible are faults of their rows alone; what is left out stays."""
    logits = np.zeros((5, 100), np.float32)
    logits[0, 99], logits[1, 3], logits[2, 5] = np.nan, np.inf, 1.0
    logits[3] = -np.inf
    space = SamplerWorkspace(100, 5, 5, device, chunk=32)
    space.newest.fill_(77)
    samples = np.zeros(5, SAMPLER)
    samples["slot"] = (0, 1, 2, 3, -1)
    samples["logits_row"] = range(5)
    samples["top_p"] = 1.0
    got = chosen(logits, samples, space, device)
    if got[:4] != [-1, -1, 5, -1] or space.newest.tolist() != [0, 0, 5, 0, 77]:
        sys.exit(f"tokens {got}, newest {space.newest.tolist()}")
    samples["temperature"] = 1.0
    if chosen(logits, samples, space, device)[:2] != [-1, -1]:
        sys.exit("a token was drawn from logits that are not finite")


def embeddings(device):
    table = torch.randn(50, 96, device=device)
    newest = torch.randint(0, 50, (6,), dtype=torch.int32, device=device)
    ids = torch.tensor([3, -1, 49, -6, 0], dtype=torch.int32, device=device)
    out = torch.empty(5, 96, device=device)
    if not embed(ids, newest, table, out).equal(embed_reference(ids, newest, table)):
        sys.exit("embeddings differ")


def main(times, device):
    embeddings(device)
    broken(device)
    rng = np.random.default_rng(5)
    for _ in range(times):
        for size in LARGE if device.type == "cuda" else SMALL:
            compare(rng, device, size)
    print("checked")


if __name__ == "__main__":
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    main(times, torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu"))
