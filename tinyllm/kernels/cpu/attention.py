"""Attention, one block of queries of a few heads at a time, heads shared out over the cores.

Under a causal mask a block of queries multiplies only with the keys up to its own end: nearly half of the products and exponentials of
the definition are never made. Scores of one block stay in the cache; kept for the backward are the output and one number a query, as in
`ops.tiled_attention`, whose formulas these are. Made for the common case; padding, documents, ALiBi and the soft cap go to the op.
"""
import math
from functools import lru_cache

import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.kernels.cpu.blocks import CACHE, scratch
from tinyllm.threads import parallel

ROWS = 128  # queries in a block
SCORES = 2**19  # that a core must get for waking it to pay


@attach(ops.attention, at_least=2**12)
def attention(q, k, v, padding=None, documents=None, slopes=None, *, causal=True, window=None, offset=0, softcap=None, scale=None):
    """`ops.attention` for causal self-attention without further masks."""
    heads, groups, length = q.shape[1], k.shape[1], q.shape[2]
    plain = padding is None and documents is None and slopes is None and softcap is None and window is None
    if not (plain and causal and offset == 0 and length == k.shape[2] and length > 1 and heads % groups == 0):
        return ops.attention.array(
            q, k, v, padding, documents, slopes, causal=causal, window=window, offset=offset, softcap=softcap, scale=scale
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    o, lse = _like_heads(q), np.empty((*q.shape[:3], 1), q.dtype)
    hidden = _hidden(q.dtype.char)

    units = _units(q, groups)

    def forward(part, _):
        for b, h, g in units[part]:
            _forward(q[b, h], k[b, g], v[b, g], scale, hidden, o[b, h], lse[b, h])

    enough = len(units) * SCORES // (q.shape[0] * heads * length * length) + 1
    parallel(forward, len(units), at_least=enough)

    def backward(do):
        dq, dk, dv = _like_heads(q), _like_heads(k), _like_heads(v)

        def work(part, _):
            for b, h, g in units[part]:
                _backward(q[b, h], k[b, g], v[b, g], scale, hidden, o[b, h], lse[b, h], do[b, h], dq[b, h], dk[b, g], dv[b, g])

        parallel(work, len(units), at_least=enough)
        return dq, dk, dv, None, None, None

    return o, backward


def _units(q, groups):
    """(row, query heads, key/value heads) of each piece of work: the heads of a group, or of several while their scores fit the cache."""
    batch, heads, length, _ = q.shape
    share = heads // groups
    several = max(1, min(groups, CACHE // (2 * min(ROWS, length) * length))) if share == 1 else 1
    starts = range(0, groups, several)
    return [
        (b, slice(g * share, min(g + several, groups) * share), slice(g, min(g + several, groups))) for b in range(batch) for g in starts
    ]


@lru_cache
def _hidden(dtype):
    """Added to the block of scores on the diagonal: -inf above it.     (ROWS, ROWS)"""
    return np.triu(np.full((ROWS, ROWS), -math.inf, dtype), 1)


def _like_heads(x):
    """An empty (B, H, T, D) array whose memory lies as (B, T, H, D), so that merging the heads afterwards copies nothing."""
    B, H, T, D = x.shape
    return np.empty((B, T, H, D), x.dtype).swapaxes(1, 2)


def _blocks(length):
    return [slice(i, min(i + ROWS, length)) for i in range(0, length, ROWS)]


def _scores(q, k, rows, scale, hidden):
    """scale·q·kᵀ of one block of queries with all keys up to its end, later ones -inf.     (n, T, D), (n or 1, T, D) -> (n, t, rows.stop)"""
    s = scratch("scores", (len(q), rows.stop - rows.start, rows.stop), q.dtype)
    np.matmul(q[:, rows], k[:, : rows.stop].swapaxes(1, 2), out=s)
    s *= scale
    s[:, :, rows] += hidden[: s.shape[1], : s.shape[1]]
    return s


def _forward(q, k, v, scale, hidden, o, lse):
    """n heads, with as many keys and values, or one that they share."""
    for rows in _blocks(q.shape[1]):
        s = _scores(q, k, rows, scale, hidden)
        top = s.max(-1, keepdims=True)
        s -= top
        np.exp(s, out=s)
        total = s.sum(-1, keepdims=True)
        lse[:, rows] = top + np.log(total)
        out = s @ v[:, : rows.stop]
        out /= total
        o[:, rows] = out


def _backward(q, k, v, scale, hidden, o, lse, do, dq, dk, dv):
    dk[...], dv[...] = 0, 0
    for rows in _blocks(q.shape[1]):
        p = _scores(q, k, rows, scale, hidden)
        p -= lse[:, rows]
        np.exp(p, out=p)
        dv[:, : rows.stop] += _shared(p.swapaxes(1, 2) @ do[:, rows], len(v))
        ds = scratch("ds", p.shape, p.dtype)
        np.matmul(do[:, rows], v[:, : rows.stop].swapaxes(1, 2), out=ds)
        ds -= (do[:, rows] * o[:, rows]).sum(-1, keepdims=True)
        ds *= p
        ds *= scale
        dq[:, rows] = ds @ k[:, : rows.stop]
        dk[:, : rows.stop] += _shared(ds.swapaxes(1, 2) @ q[:, rows], len(k))


def _shared(gradient, heads):
    """Σ over the query heads that share a key/value head."""
    return gradient if len(gradient) == heads else gradient.sum(0, keepdims=True)
