"""The online softmax that decode and prefill share, in units of log2(e).

The state of a row is (m, total, acc): the largest score so far, the sum of weights and the weighted
sum of values, both relative to m. Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores(q, k, scale_log2, softcap_log2, SOFTCAP: tl.constexpr, CT: tl.constexpr):
    """Scores in units of log2(e), [rows, keys], fp32."""
    s = tl.dot(q, tl.trans(k).to(CT)) * scale_log2
    if SOFTCAP:
        # cap·tanh(s/cap) through exp2: tanh(x) = 1 − 2/(exp(2x) + 1); s carries log2(e) already
        s = softcap_log2 * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2_E) / softcap_log2) + 1.0))
    return s


@triton.jit
def take_tile(m, total, acc, s, v, MAY_BE_EMPTY: tl.constexpr, CT: tl.constexpr):
    """The state after one more tile of scores [rows, keys] and values [keys, dim].

    MAY_BE_EMPTY: a row may see no key of this tile and have seen none before.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    # keeps exp2 away from inf − inf
    base = tl.where(m_new == -float("inf"), 0.0, m_new) if MAY_BE_EMPTY else m_new
    alpha = tl.exp2(m - base)
    p = tl.exp2(s - base[:, None])
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(CT), v.to(CT), acc * alpha[:, None])
    return m_new, total, acc


@triton.jit
def take_sink(m, total, acc, sink):
    """The state with a sink: one more logit [rows], without a value, in the denominator alone."""
    sink = sink * LOG2_E
    m_new = tl.maximum(m, sink)
    alpha = tl.exp2(m - m_new)
    return m_new, total * alpha + tl.exp2(sink - m_new), acc * alpha[:, None]


@triton.jit
def combine(m, total, acc, m_next, total_next, acc_next):
    """The state over two ranges of keys from the states over each; either may be empty.

    The order of the calls decides the bits, wherever they are made: the fused multiply-adds are
    written out, so that no compiler chooses them. An empty range changes no bit of the other.
    """
    m_new = tl.maximum(m, m_next)
    base = tl.where(m_new == -float("inf"), 0.0, m_new)
    a, b = tl.exp2(m - base), tl.exp2(m_next - base)
    total = tl.fma(total_next, b, total * a)
    acc = tl.fma(acc_next, tl.broadcast_to(b[:, None], acc.shape), acc * a[:, None])
    return m_new, total, acc
