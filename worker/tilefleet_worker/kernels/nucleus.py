"""Parts of the sampling kernel for rows with top-k or top-p: no sort of the vocabulary.

The likeliest tokens, at most CAPACITY of them, are found by bisection over the bits of their
logits and copied aside; each then counts who is before it. Where these do not reach (a flat
distribution), masses are bisected over the whole row, which costs some hundred passes over it.
Everything is of one row by one program, so nothing depends on other rows.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-0x7F800000)  # order(-inf)


@triton.jit
def order(x):
    """int32 in the order of these fp32 numbers; both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def number(key):
    """The fp32 number of order()."""
    bits = tl.where(key < 0, -key | -0x80000000, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weigh(x, best, temperature, min_p):
    """fp64 weights of logits: 1 for the best, 0 below min_p."""
    weight = tl.exp((x.to(tl.float64) - best) / temperature)
    return tl.where(weight < min_p, 0.0, weight)


@triton.jit
def _part(row_ptr, start, vocab, BLOCK: tl.constexpr):
    """Ids, logits, and which of them exist."""
    ids = start + tl.arange(0, BLOCK)
    ok = ids < vocab
    return ids, tl.load(row_ptr + ids, mask=ok, other=-float("inf")), ok


@triton.jit
def _count_from(row_ptr, vocab, bound, BLOCK: tl.constexpr):
    """Tokens whose key is at least `bound`."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        _, x, ok = _part(row_ptr, start, vocab, BLOCK)
        found += (ok & (order(x) >= bound)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def candidate_bound(row_ptr, vocab, first, top, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """A key that at most CAPACITY tokens reach, and a quarter of that if ties allow it.

    first: the key to try first. top: the largest key of the row. Both int32.
    """
    low = tl.full([], LOWEST - 1, tl.int64)
    high = top.to(tl.int64) + 1
    probe = first.to(tl.int64)
    reached = tl.full([], 0, tl.int32)
    while (high - low > 1) & (reached < CAPACITY // 4):
        found = _count_from(row_ptr, vocab, probe, BLOCK)
        fits = found <= CAPACITY
        high = tl.where(fits, probe, high)
        low = tl.where(fits, low, probe)
        reached = tl.where(fits, found, reached)
        probe = (low + high) >> 1
    return high


@triton.jit
def gather_candidates(row_ptr, vocab, bound, x_ptr, id_ptr, BLOCK: tl.constexpr):
    """Copy the tokens whose key reaches `bound`, in the order of ids. Returns their number."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        ids, x, ok = _part(row_ptr, start, vocab, BLOCK)
        keep = ok & (order(x) >= bound)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(x_ptr + place, x, mask=keep)
        tl.store(id_ptr + place, ids, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()  # all warps have written before any reads
    return count


@triton.jit
def draw_among(
    x_ptr, id_ptr, count, vocab, best, temperature, min_p, top_k, top_p, total, uniform,
    CAPACITY: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The token drawn among the candidates, or -1 when these are too few to know.

    total: mass of the whole vocabulary.
    """
    place = tl.arange(0, CAPACITY)
    ok = place < count
    x = tl.load(x_ptr + place, mask=ok, other=-float("inf"))
    ids = tl.load(id_ptr + place, mask=ok, other=vocab)
    weight = tl.where(ok, weigh(x, best, temperature, min_p), 0.0)
    rank = tl.zeros([CAPACITY], tl.int32)
    before = tl.zeros([CAPACITY], tl.float64)
    for start in range(0, count, STEP):
        there = start + tl.arange(0, STEP)
        real = there < count
        x_other = tl.load(x_ptr + there, mask=real, other=-float("inf"))[None, :]
        id_other = tl.load(id_ptr + there, mask=real, other=vocab)[None, :]
        weight_other = weigh(x_other, best, temperature, min_p)
        tied = (x_other == x[:, None]) & (id_other < ids[:, None])
        ahead = real[None, :] & ((x_other > x[:, None]) | tied)
        rank += tl.sum(ahead.to(tl.int32), 1)
        before += tl.sum(tl.where(ahead, weight_other, 0.0), 1)
    within = ok & (rank < top_k)
    mass = tl.sum(tl.where(within, weight, 0.0), 0)
    whole = tl.where(top_k <= count, mass, total)
    enough = (top_k <= count) | ((top_k >= vocab) & (mass >= top_p * total))
    kept = within & (before < top_p * whole)
    target = uniform * tl.sum(tl.where(kept, weight, 0.0), 0)
    possible = kept & (before <= target) & (weight > 0.0)
    last = tl.max(tl.where(possible, rank, -1), 0)
    token = tl.max(tl.where(possible & (rank == last), ids, -1), 0)
    return tl.where(enough, token, -1)


@triton.jit
def _mass_from(row_ptr, vocab, bound, best, temperature, min_p, BLOCK: tl.constexpr):
    """Mass and number of the tokens whose key is at least `bound`."""
    mass = tl.zeros([BLOCK], tl.float64)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        _, x, ok = _part(row_ptr, start, vocab, BLOCK)
        keep = ok & (order(x) >= bound)
        mass += tl.where(keep, weigh(x, best, temperature, min_p), 0.0)
        found += keep.to(tl.int32)
    return tl.sum(mass, 0), tl.sum(found, 0)


@triton.jit
def _crossing(
    row_ptr, vocab, top, wanted_mass, wanted_count, best, temperature, min_p,
    ABOVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key from which mass and number reach what is wanted; ABOVE: the mass exceeds it.

    Also the mass and number of the tokens before that key, and the weight of each of its own.
    """
    low = tl.full([], LOWEST, tl.int64)
    high = top.to(tl.int64) + 1
    while high - low > 1:
        probe = (low + high) >> 1
        mass, found = _mass_from(row_ptr, vocab, probe, best, temperature, min_p, BLOCK)
        if ABOVE:
            reached = (mass > wanted_mass) & (found >= wanted_count)
        else:
            reached = (mass >= wanted_mass) & (found >= wanted_count)
        low = tl.where(reached, probe, low)
        high = tl.where(reached, high, probe)
    mass, found = _mass_from(row_ptr, vocab, high, best, temperature, min_p, BLOCK)
    weight = weigh(number(low.to(tl.int32)), best, temperature, min_p)
    return low, mass, found, weight


@triton.jit
def _nth_of(row_ptr, vocab, key, index, BLOCK: tl.constexpr):
    """Id of the token with this key after `index` others of it, or of the last one."""
    token = tl.full([], -1, tl.int32)
    seen = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        ids, x, ok = _part(row_ptr, start, vocab, BLOCK)
        same = ok & (order(x) == key)
        place = seen + tl.cumsum(same.to(tl.int32), 0) - 1
        token = tl.maximum(token, tl.max(tl.where(same & (place <= index), ids, -1), 0))
        seen += tl.sum(same.to(tl.int32), 0)
    return token


@triton.jit
def draw_by_mass(
    row_ptr, vocab, top, best, temperature, min_p, top_k, top_p, uniform, BLOCK: tl.constexpr
):
    """The token drawn where the candidates are too few: masses of the whole row, bisected."""
    mass, found = _mass_from(row_ptr, vocab, LOWEST, best, temperature, min_p, BLOCK)
    if top_k < vocab:
        key, before, found, weight = _crossing(
            row_ptr, vocab, top, -1.0, top_k, best, temperature, min_p, False, BLOCK
        )
        mass = before + (top_k - found).to(tl.float64) * weight
    if top_p < 1.0:
        wanted = top_p * mass
        key, before, found, weight = _crossing(
            row_ptr, vocab, top, wanted, 0, best, temperature, min_p, False, BLOCK
        )
        ties = tl.maximum(tl.ceil((wanted - before) / weight), 1.0)
        mass = tl.minimum(before + ties * weight, mass)
    target = uniform * mass
    key, before, found, weight = _crossing(
        row_ptr, vocab, top, target, 0, best, temperature, min_p, True, BLOCK
    )
    index = tl.maximum((target - before) / weight, 0.0).to(tl.int32)
    return _nth_of(row_ptr, vocab, key, index, BLOCK)
