"""Matrix products of few rows with all that stands around them, in one launch each.

A decode step reads every weight once for a few rows, so a product is as fast as its weights stream.
A program takes a strip of output features and a fixed part of the inner dimension, and keeps loads
of the strip in flight. What a layer does between its products rides along:

* RMSNorm (Zhang and Sennrich, 2019): the product that ends a block adds to the fp32 residual stream
  and writes the new stream times the next norm's weight, rounded, and the squares of the stream
  summed by groups of features. The next product scales its sums by 1 / rms, a factor a row.
* SwiGLU (Shazeer, 2020): one program computes the same features of gate and up.

The bits of a row depend on the row alone: sums run over the inner dimension in an order that the
matrix alone decides (splits and part), partial sums are added by the last program to arrive, in
order, and squares are summed in pairs, which no thread layout can reorder.
"""

import triton
import triton.language as tl


@triton.jit
def sum_in_pairs(x, LENGTHS: tl.constexpr, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """Sums over the last of [LENGTHS, COUNT = 2^LEVELS]: neighbours first, whatever the layout."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [LENGTHS, COUNT >> (level + 1), 2]), 2)
    return tl.reshape(x, [LENGTHS])


@triton.jit
def _load_squares(square_ptr, m, rows, inner, first, GROUP: tl.constexpr, COUNT: tl.constexpr):
    """Sums of squares of rows m, of the groups from `first` on, [rows, COUNT]."""
    group = first + tl.arange(0, COUNT)
    groups = tl.cdiv(inner, GROUP)
    ok = (m < rows)[:, None] & (group < groups)[None, :]
    return tl.load(square_ptr + m[:, None] * groups + group[None, :], mask=ok, other=0.0)


@triton.jit
def _sum_squares(
    square_ptr, m, rows, inner, GROUP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    LEVELS: tl.constexpr, PIECE_LEVELS: tl.constexpr,
):  # fmt: skip
    """sum_in_pairs of _load_squares in 2^PIECE_LEVELS pieces: at once they take all registers."""
    pieces: tl.constexpr = 1 << PIECE_LEVELS
    size: tl.constexpr = COUNT // pieces
    sums = tl.zeros([ROWS, pieces], tl.float32)
    for piece in tl.static_range(pieces):
        squares = _load_squares(square_ptr, m, rows, inner, piece * size, GROUP, size)
        one = sum_in_pairs(squares, ROWS, size, LEVELS - PIECE_LEVELS)
        sums = tl.where((tl.arange(0, pieces) == piece)[None, :], one[:, None], sums)
    return sum_in_pairs(sums, ROWS, pieces, PIECE_LEVELS)


@triton.jit(do_not_specialize=["rows", "splits"])
def few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, square_ptr, residual_ptr, norm_ptr, out_ptr, square_out_ptr,
    part_ptr, count_ptr, rows, features, inner, splits, part, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, GROUP_LEVELS: tl.constexpr, SQUARES: tl.constexpr,
    SQUARE_LEVELS: tl.constexpr, PIECE_LEVELS: tl.constexpr, EVEN: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of ROWS rows, strips of COLUMNS features, splits of the inner dimension).

    x [rows, inner], weight [features, inner] (GATED: gates, then ups), out [rows, features].
    SQUARES > 0: square [rows, inner / GROUP] holds the sums of squares behind x, and the product is
    scaled by 1 / rms; SQUARES is their number, padded. RESIDUAL: residual fp32 [rows, features]
    grows by the product, out is its copy times norm, square_out [rows, features / GROUP].
    part: inner elements of a split, a multiple of DEPTH. TMA: x and weight are descriptors of
    [rows, inner] and [features, inner] whose boxes are tiles; what is beyond a matrix reads as 0.
    """
    tile, strip, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tile * ROWS + tl.arange(0, ROWS)
    n = strip * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    row_ok, feature_ok = m < rows, n < features
    begin = split * part
    end = tl.minimum(begin + part, inner)
    if SQUARES > 0 and ROWS <= 32:  # on its way while the strip streams, in few registers
        squares = _load_squares(square_ptr, m, rows, inner, 0, GROUP, SQUARES)
    if not TMA:
        # A strip's end beyond the matrix reads the last row again; its sums are never stored.
        weight_row = tl.minimum(n, features - 1).to(tl.int64) * inner
        weight_at = weight_ptr + weight_row[:, None] + k[None, :]
        up_at = weight_at + features.to(tl.int64) * inner
        x_at = x_ptr + m.to(tl.int64)[:, None] * inner + k[None, :]
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    up = acc
    for start in tl.range(begin, end, DEPTH):
        if TMA:
            w = weight_ptr.load([strip * COLUMNS, start])
            x = x_ptr.load([tile * ROWS, start])
        elif EVEN:
            w = tl.load(weight_at + start)
            x = tl.load(x_at + start, mask=row_ok[:, None], other=0.0)
        else:
            inside = start + k < inner
            w = tl.load(weight_at + start, mask=inside[None, :], other=0.0)
            x = tl.load(x_at + start, mask=row_ok[:, None] & inside[None, :], other=0.0)
        x = tl.trans(x.to(CT))
        acc = tl.dot(w.to(CT), x, acc)
        if GATED:
            if TMA:
                u = weight_ptr.load([features + strip * COLUMNS, start])
            elif EVEN:
                u = tl.load(up_at + start)
            else:
                u = tl.load(up_at + start, mask=(start + k < inner)[None, :], other=0.0)
            up = tl.dot(u.to(CT), x, up)

    if SPLIT:
        flat = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        group_id = tile * tl.num_programs(1) + strip
        size: tl.constexpr = COLUMNS * ROWS * (2 if GATED else 1)
        cell = part_ptr + group_id.to(tl.int64) * (splits * size)
        tl.store(cell + split * size + flat, acc)
        if GATED:
            tl.store(cell + split * size + COLUMNS * ROWS + flat, up)
        tl.debug_barrier()  # every warp's partial is written before the counter says so
        if tl.atomic_add(count_ptr + group_id, 1, sem="acq_rel") + 1 < splits:
            return
        tl.store(count_ptr + group_id, 0)  # ready for the next product or replay
        acc = tl.zeros([COLUMNS, ROWS], tl.float32)
        up = acc
        for i in tl.range(splits):
            # .cg: other SMs wrote these; L1 may hold older bytes
            acc += tl.load(cell + i * size + flat, cache_modifier=".cg")
            if GATED:
                up += tl.load(cell + i * size + COLUMNS * ROWS + flat, cache_modifier=".cg")

    if SQUARES > 0:
        if PIECE_LEVELS > 0:
            square = _sum_squares(
                square_ptr, m, rows, inner, GROUP, ROWS, SQUARES, SQUARE_LEVELS, PIECE_LEVELS
            )
        else:
            if ROWS > 32:
                squares = _load_squares(square_ptr, m, rows, inner, 0, GROUP, SQUARES)
            square = sum_in_pairs(squares, ROWS, SQUARES, SQUARE_LEVELS)
        scale = tl.rsqrt(square / inner + eps)
        acc *= scale[None, :]
        if GATED:
            up *= scale[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=feature_ok, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * features + n[:, None]
    ok = row_ok[None, :] & feature_ok[:, None]
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=ok, other=0.0)
        tl.store(residual_ptr + at, acc, mask=ok)
        parts: tl.constexpr = COLUMNS // GROUP
        square = tl.trans(tl.where(ok, acc * acc, 0.0))
        square = sum_in_pairs(square, ROWS * parts, GROUP, GROUP_LEVELS)
        j = tl.arange(0, ROWS * parts)
        row, part = tile * ROWS + j // parts, strip * parts + j % parts
        groups_out = tl.cdiv(features, GROUP)
        square_ok = (row < rows) & (part < groups_out)
        tl.store(square_out_ptr + row * groups_out + part, square, mask=square_ok)
        acc *= tl.load(norm_ptr + n, mask=feature_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def begin_kernel(
    residual_ptr, norm_ptr, out_ptr, square_ptr,
    FEATURES: tl.constexpr, PAD: tl.constexpr, GROUP: tl.constexpr, GROUP_LEVELS: tl.constexpr,
):  # fmt: skip
    """One program a row: what a product that adds leaves beside the stream, for its beginning."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PAD)
    ok = column < FEATURES
    x = tl.load(residual_ptr + row * FEATURES + column, mask=ok, other=0.0)
    groups: tl.constexpr = (FEATURES + GROUP - 1) // GROUP
    square = sum_in_pairs(x * x, PAD // GROUP, GROUP, GROUP_LEVELS)
    group = tl.arange(0, PAD // GROUP)
    tl.store(square_ptr + row * groups + group, square, mask=group < groups)
    weight = tl.load(norm_ptr + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * FEATURES + column, (x * weight).to(out_ptr.dtype.element_ty), mask=ok)
