"""From logits to tokens on the device: the choice of `choice.draw`, for requests that are plain.

Three launches: the likeliest token of every chunk of the vocabulary, the weight of every chunk, and
the choice. Greedy rows leave the second at once. Weights exp((logit - best) / temperature) and
their sums are fp64 as on the host, and the random number is the host's (Philox 4x64 keyed by seed
and position). Ties go to the smaller id. Sums are added in another order than the host's, always
the same one, which moves a boundary between two tokens by about 2^-53 of the whole: the token is
the host's but for one draw in some 10^11, and never depends on other rows.
"""

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from tilefleet_worker.kernels.nucleus import (
    candidate_bound,
    draw_among,
    draw_by_mass,
    gather_candidates,
    order,
    weigh,
)

CHUNK = 2048
CAPACITY = 1024
STEP = 8
OPTIONS = {
    name: {"num_warps": warps, "enable_fp_fusion": True}
    for name, warps in (
        ("chunk_best_kernel", 4), ("chunk_weight_kernel", 4), ("choose_kernel", 16)
    )
}  # fmt: skip
"""Launch options; fp fusion is pinned: Triton 3.10 changes its default, and with it bits."""
# A sample is 12 int32 words, see request_table.SAMPLER: slot, row of the logits, position, top_k;
# then fp64 temperature, top_p, min_p; then the seed.
WORDS = 12
_WORDS, _PAIRS = tl.constexpr(WORDS), tl.constexpr(WORDS // 2)


@triton.jit
def chunk_best_kernel(
    logits_ptr, word_ptr, best_ptr, id_ptr, vocab, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """One program a sample and chunk: its largest logit and that token's id; NaN if it has one."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    if tl.load(word_ptr + row * _WORDS) < 0:
        return
    at = tl.load(word_ptr + row * _WORDS + 1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + at * vocab + ids, mask=ids < vocab, other=-float("inf"))
    best = tl.max(x, 0)
    found = tl.min(tl.where(x == best, ids, vocab), 0)
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    tl.store(best_ptr + row * CHUNKS + chunk, tl.where(broken, float("nan"), best))
    tl.store(id_ptr + row * CHUNKS + chunk, found)


@triton.jit
def chunk_weight_kernel(
    logits_ptr, word_ptr, pair_ptr, best_ptr, weight_ptr, vocab,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program a sample and chunk: the sum of its weights, unless the sample is greedy."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    if tl.load(word_ptr + row * _WORDS) < 0:
        return
    temperature = tl.load(pair_ptr + row * _PAIRS + 2)
    if temperature == 0.0:
        return
    min_p = tl.load(pair_ptr + row * _PAIRS + 4)
    every = tl.arange(0, CHUNKS)
    used = every * CHUNK < vocab
    bests = tl.load(best_ptr + row * CHUNKS + every, mask=used, other=-float("inf"))
    best = tl.max(bests, 0).to(tl.float64)
    at = tl.load(word_ptr + row * _WORDS + 1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + at * vocab + ids, mask=ids < vocab, other=-float("inf"))
    mass = tl.sum(weigh(x, best, temperature, min_p), 0)
    tl.store(weight_ptr + row * CHUNKS + chunk, mass)


@triton.jit
def _uniform(seed, position):
    """A number in [0, 1) by seed and position: the first of NumPy's Philox with this key."""
    zero = tl.full([], 0, tl.uint64)
    key = seed.to(tl.uint64, bitcast=True)
    bits, _, _, _ = philox_impl(zero + 1, zero, zero, zero, key, position.to(tl.uint64))
    return (bits >> 11).to(tl.float64) * (2.0**-53)


@triton.jit
def _draw_all(
    row_ptr, vocab, weights, best, temperature, min_p, uniform,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The token drawn from the whole vocabulary, in the order of ids. weights: of its chunks."""
    chunk = tl.arange(0, CHUNKS)
    sums = tl.cumsum(weights, 0)
    target = uniform * tl.max(sums, 0)
    last = tl.max(tl.where(weights > 0.0, chunk, 0), 0)
    mine = tl.minimum(tl.sum((sums <= target).to(tl.int32), 0), last)
    before = tl.sum(tl.where(chunk == mine - 1, sums, 0.0), 0)
    ids = mine * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=-float("inf"))
    weight = weigh(x, best, temperature, min_p)
    passed = tl.sum((before + tl.cumsum(weight, 0) <= target).to(tl.int32), 0)
    return tl.minimum(mine * CHUNK + passed, tl.max(tl.where(weight > 0.0, ids, 0), 0))


@triton.jit
def choose_kernel(
    logits_ptr, word_ptr, pair_ptr, seed_ptr, best_ptr, id_ptr, weight_ptr, near_ptr, near_id_ptr,
    token_ptr, newest_ptr, vocab,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One program a sample: its token, -1 when its logits are not finite."""
    row = tl.program_id(0)
    slot = tl.load(word_ptr + row * _WORDS)
    if slot < 0:
        return
    chunk = tl.arange(0, CHUNKS)
    used = chunk * CHUNK < vocab
    bests = tl.load(best_ptr + row * CHUNKS + chunk, mask=used, other=-float("inf"))
    top = tl.max(bests, 0)
    broken = tl.max((bests != bests).to(tl.int32), 0) > 0
    broken = broken | (top == float("inf")) | (top == -float("inf"))
    ids = tl.load(id_ptr + row * CHUNKS + chunk, mask=used, other=vocab)
    token = tl.min(tl.where(bests == top, ids, vocab), 0)
    temperature = tl.load(pair_ptr + row * _PAIRS + 2)
    if (temperature > 0.0) & (broken == 0):
        at = tl.load(word_ptr + row * _WORDS + 1).to(tl.int64)
        row_ptr = logits_ptr + at * vocab
        best = top.to(tl.float64)
        top_k = tl.load(word_ptr + row * _WORDS + 3)
        top_k = tl.where((top_k > 0) & (top_k < vocab), top_k, vocab)
        top_p = tl.load(pair_ptr + row * _PAIRS + 3)
        min_p = tl.load(pair_ptr + row * _PAIRS + 4)
        position = tl.load(word_ptr + row * _WORDS + 2)
        uniform = _uniform(tl.load(seed_ptr + row * _PAIRS + 5), position)
        weights = tl.load(weight_ptr + row * CHUNKS + chunk, mask=used, other=0.0)
        if (top_k == vocab) & (top_p == 1.0):
            token = _draw_all(
                row_ptr, vocab, weights, best, temperature, min_p, uniform, CHUNK, CHUNKS
            )
        else:
            first = order(tl.min(tl.where(used, bests, float("inf")), 0))
            bound = candidate_bound(row_ptr, vocab, first, order(top), CAPACITY, BLOCK)
            x_ptr, near_ids = near_ptr + row * CAPACITY, near_id_ptr + row * CAPACITY
            count = gather_candidates(row_ptr, vocab, bound, x_ptr, near_ids, BLOCK)
            token = draw_among(
                x_ptr, near_ids, count, vocab, best, temperature, min_p, top_k, top_p,
                tl.sum(weights, 0), uniform, CAPACITY, STEP,
            )  # fmt: skip
            if token < 0:
                token = draw_by_mass(
                    row_ptr, vocab, order(top), best, temperature, min_p, top_k, top_p, uniform,
                    BLOCK,
                )  # fmt: skip
    tl.store(token_ptr + row, tl.where(broken, -1, token))
    tl.store(newest_ptr + slot, tl.where(broken, 0, token))


class SamplerWorkspace:
    """Scratch of up to max_rows samples, their tokens, and the newest token of every slot."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        num_slots: int,
        device: torch.device,
        *,
        chunk: int = CHUNK,
        capacity: int = CAPACITY,
    ) -> None:
        def table(columns: int, kind: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows, columns, dtype=kind, device=device)

        self.chunk, self.capacity = chunk, capacity
        self.num_chunks = triton.cdiv(vocab_size, chunk)
        self.chunks = triton.next_power_of_2(self.num_chunks)
        self.best = table(self.chunks, torch.float32)
        self.ids = table(self.chunks, torch.int32)
        self.weights = table(self.chunks, torch.float64)
        self.near = table(capacity, torch.float32)
        self.near_ids = table(capacity, torch.int32)
        self.tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.newest = torch.zeros(num_slots, dtype=torch.int32, device=device)


def choose_tokens(
    logits: torch.Tensor, samples: torch.Tensor, space: SamplerWorkspace
) -> torch.Tensor:
    """Choose the tokens of `samples` and keep each as the newest of its slot. Launches only.

    logits: fp32 [rows, vocabulary], contiguous. samples: int32 [samples, WORDS]; those with a
    negative slot are left out. Returns int32 [samples]: -1 where logits are not finite, anything
    where a sample was left out. A row's token depends on the row alone.
    """
    count, vocab = len(samples), logits.shape[1]
    pairs, seeds = samples.view(torch.float64), samples.view(torch.int64)
    grid = (count, space.num_chunks)
    sizes = {"CHUNK": space.chunk, "CHUNKS": space.chunks}
    chunk_best_kernel[grid](
        logits, samples, space.best, space.ids, vocab, **sizes, **OPTIONS["chunk_best_kernel"]
    )
    chunk_weight_kernel[grid](
        logits, samples, pairs, space.best, space.weights, vocab, **sizes,
        **OPTIONS["chunk_weight_kernel"],
    )  # fmt: skip
    choose_kernel[(count,)](
        logits, samples, pairs, seeds, space.best, space.ids, space.weights, space.near,
        space.near_ids, space.tokens, space.newest, vocab,
        **sizes, CAPACITY=space.capacity, BLOCK=space.chunk, STEP=STEP,
        **OPTIONS["choose_kernel"],
    )  # fmt: skip
    return space.tokens[:count]
