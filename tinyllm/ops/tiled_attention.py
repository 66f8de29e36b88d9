"""The same attention with memory linear in T: no (T, S) array ever exists.

Queries and keys are cut into blocks. For one block of queries, key blocks are visited in turn, keeping per query a running maximum m,
a running sum l of e^(s-m), and the output so far o, weighted with the same e^(s-m). When a block raises the maximum from m to m', what
was gathered so far is rescaled by e^(m-m'):

    m' = max(m, max s)      l' = l·e^(m-m') + Σ e^(s-m')      o' = o·e^(m-m') + e^(s-m')·v           finally  o/l  and  lse = m + ln l

The backward needs no p from the forward: with lse saved, p = e^(s-lse) is computed again, block by block. And the row sums that the
softmax's derivative asks for need no second pass over the keys, since  Σⱼ dpⱼ·pⱼ = Σⱼ (do·vⱼ)·pⱼ = do·o:

    δ = Σ_D do·o      ds = p·(dp - δ)

Blocks that positions hide (the upper half under a causal mask, all beyond a window) are never computed.
Sources: Milakov & Gimelshein 2018 (running softmax); Dao et al. 2022; Dao 2023 (FlashAttention-2).
"""
import math

from tinyllm.backend import array_module
from tinyllm.ops.attention import ScoreBias, group_heads, scores
from tinyllm.tensor import op


@op
def tiled_attention(
    q, k, v, padding=None, documents=None, slopes=None, *, causal=True, window=None, offset=0, softcap=None, scale=None, block=128
):
    """`attention`, block by block: same arguments, same result up to rounding. block : queries and keys per block."""
    xp = array_module(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    qg = group_heads(q, k.shape[1])
    bias = ScoreBias(xp, q, k, padding, documents, slopes, causal, window, offset)
    o = xp.zeros_like(qg)
    lse = xp.zeros((*qg.shape[:-1], 1), dtype=q.dtype)
    row_blocks = _blocks(q.shape[2], block)
    for rows in row_blocks:
        columns = [c for c in _blocks(k.shape[2], block) if not bias.sees_nothing(rows, c)]
        o[..., rows, :], lse[..., rows, :] = _forward_rows(xp, qg[..., rows, :], k, v, rows, columns, bias, scale, softcap)

    def backward(do):
        do = group_heads(do, k.shape[1])
        delta = (do * o).sum(-1, keepdims=True)
        dq, dk, dv = xp.zeros_like(qg), xp.zeros_like(k), xp.zeros_like(v)
        for rows in row_blocks:
            for c in _blocks(k.shape[2], block):
                if bias.sees_nothing(rows, c):
                    continue
                block_of = (slice(None), slice(None), slice(None), rows)
                parts = _backward_block(
                    xp, qg[block_of], k[:, :, None, c], v[:, :, None, c], do[block_of], lse[block_of], delta[block_of],
                    rows, c, bias, scale, softcap,
                )  # fmt: skip
                dq[block_of] += parts[0]
                dk[:, :, c] += parts[1]
                dv[:, :, c] += parts[2]
        return dq.reshape(q.shape), dk, dv, None, None, None

    return o.reshape(q.shape), backward


def _blocks(n, block):
    return [slice(i, min(i + block, n)) for i in range(0, n, block)]


def _forward_rows(xp, q, k, v, rows, columns, bias, scale, softcap):
    """Output and log-sum-exp of one block of queries over its visible key blocks.     (B, G, R, t, D) -> (B, G, R, t, D), (…, t, 1)"""
    m = xp.full((*q.shape[:-1], 1), -math.inf, dtype=q.dtype)
    total, o = xp.zeros_like(m), xp.zeros_like(q)
    for c in columns:
        s, _ = scores(q, k[:, :, None, c], scale, softcap)
        s = bias.add_to(s, rows, c)
        higher = xp.maximum(m, s.max(-1, keepdims=True))
        safe = xp.where(xp.isfinite(higher), higher, xp.zeros_like(higher))  # nothing seen yet: e^(-inf - 0) = 0, not e^(inf - inf)
        p = xp.exp(s - safe)
        shrink = xp.exp(m - safe)
        total = total * shrink + p.sum(-1, keepdims=True)
        o = o * shrink + p @ v[:, :, None, c]
        m = higher
    nothing = total == 0
    total = xp.where(nothing, xp.ones_like(total), total)
    lse = xp.where(nothing, xp.full_like(m, math.inf), m + xp.log(total))  # +inf: p = e^(s - inf) is 0 in the backward too
    return o / total, lse


def _backward_block(xp, q, k, v, do, lse, delta, rows, columns, bias, scale, softcap):
    """What one block of queries and one block of keys add to dq, dk and dv."""
    s, cap_slope = scores(q, k, scale, softcap)
    p = xp.exp(bias.add_to(s, rows, columns) - lse)
    ds = p * (do @ v.swapaxes(-1, -2) - delta)
    ds *= scale if cap_slope is None else scale * cap_slope
    dv = (p.swapaxes(-1, -2) @ do).sum(2)
    return ds @ k, (ds.swapaxes(-1, -2) @ q).sum(2), dv
