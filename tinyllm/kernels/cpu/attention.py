"""Causal attention, one block of queries of a few heads at a time, heads shared out over the cores.

A block of queries multiplies only with the keys up to its own end: nearly half of the products and exponentials of the definition are
never made. Scores of one block stay in the cache; kept for the backward are the output and one number a query, as in
`ops.tiled_attention`, whose formulas these are. Made for the common case; windows, offsets, padding, documents, ALiBi and the soft cap go to the op.

Scores lie transposed, keys down and queries across: the largest and the sum over all keys are then taken over whole rows of memory,
several times faster than along rows of 64 or 256, and what belongs to a query is added to a row as it stands. 1/√D multiplies q, which
is smaller than the scores, before all else. Measured, one core of an AMD EPYC (Zen 4), forward and backward:

    rows, heads, T, D      this             scores as rows     one head a time
    6, 4, 64, 32           0.42 + 0.64 ms   0.55 + 0.87 ms     0.94 + 1.19 ms
    4, 6, 256, 64          5.7 + 11.0 ms    6.6 + 13.7 ms      7.1 + 13.6 ms
"""
import math
from functools import lru_cache

import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.kernels.cpu.blocks import scratch
from tinyllm.threads import parallel

ROWS = 64  # queries in a block
SCORES = 2**17  # of a block of several heads: 512 KB in float32, half of a usual second-level cache
SHARE = 2**19  # scores that a core must get for waking it to pay


@attach(ops.attention, at_least=2**12)
def attention(q, k, v, padding=None, documents=None, slopes=None, *, causal=True, window=None, offset=0, softcap=None, scale=None):
    """`ops.attention` for causal self-attention without further masks."""
    plain = padding is None and documents is None and slopes is None and softcap is None and window is None
    if not (plain and causal and offset == 0 and q.shape[2] == k.shape[2] > 1 and q.shape[1] % k.shape[1] == 0):
        return ops.attention.array(
            q, k, v, padding, documents, slopes, causal=causal, window=window, offset=offset, softcap=softcap, scale=scale
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scaled = np.multiply(q, scale, out=like_heads(q))
    o = like_heads(q)
    lse = forward(scaled, k, v, o)

    def gradient(do):
        dq, dk, dv = like_heads(q), like_heads(k), like_heads(v)
        backward(scaled, k, v, o, lse, do, dq, dk, dv)
        return np.multiply(dq, scale, out=dq), dk, dv, None, None, None

    return o, gradient


def like_heads(x):
    """An empty (B, H, T, D) array whose memory lies as (B, T, H, D), so that merging the heads afterwards copies nothing."""
    B, H, T, D = x.shape
    return np.empty((B, T, H, D), x.dtype).swapaxes(1, 2)


def forward(q, k, v, o):
    """Write o; return the log of each query's sum of exponentials. q is scaled already.     (B, H, T, D), (B, G, T, D) twice -> (B, G, H/G, 1, T)"""
    groups = k.shape[1]
    q, k, v, o = _grouped(q, groups), _grouped(k, groups), _grouped(v, groups), _grouped(o, groups)
    lse = np.empty((*q.shape[:3], 1, q.shape[3]), q.dtype)
    _share_out(lambda unit: _forward(q[unit], k[unit], v[unit], o[unit], lse[unit]), q)
    return lse


def backward(q, k, v, o, lse, do, dq, dk, dv):
    """Write dq (of the scaled q), dk and dv."""
    groups = k.shape[1]
    arrays = [_grouped(x, groups) for x in (q, k, v, o, do, dq, dk, dv)]

    def work(unit):
        q, k, v, o, do, dq, dk, dv = (x[unit] for x in arrays)
        _backward(q, k, v, o, lse[unit], do, dq, dk, dv)

    _share_out(work, arrays[0])


def _grouped(x, groups):
    """(B, H, T, D) -> (B, G, H/G, T, D), H/G the query heads that share a key/value head."""
    return x.reshape(len(x), groups, -1, *x.shape[2:])


def _share_out(work, q):
    """work(unit) for every row and group of heads: as many at a time as keep their scores in the cache."""
    B, G, share, T, _ = q.shape
    heads = max(1, SCORES // (share * min(ROWS, T) * T))  # groups of them in a unit
    rows, heads = max(1, heads // G), min(heads, G)
    units = [(slice(b, b + rows), slice(g, g + heads)) for b in range(0, B, rows) for g in range(0, G, heads)]

    def some(part, _):
        for unit in units[part]:
            work(unit)

    parallel(some, len(units), at_least=len(units) * SHARE // (B * G * share * T * T) + 1)


def _blocks(length):
    return [slice(i, min(i + ROWS, length)) for i in range(0, length, ROWS)]


@lru_cache
def _hidden(dtype):
    """Added to the block of scores on the diagonal: -inf for keys later than the query.     (ROWS, ROWS)"""
    return np.tril(np.full((ROWS, ROWS), -math.inf, dtype), -1)


def _scores(q, k, rows):
    """k·qᵀ of all keys up to the end of a block of queries, later ones than the query -inf.     -> (…, rows.stop, rows)"""
    count = rows.stop - rows.start
    s = scratch("scores", (*q.shape[:3], rows.stop, count), q.dtype)
    np.matmul(k[..., : rows.stop, :], q[..., rows, :].swapaxes(-1, -2), out=s)
    s[..., rows, :] += _hidden(q.dtype.char)[:count, :count]
    return s


def _forward(q, k, v, o, lse):
    for rows in _blocks(q.shape[-2]):
        s = _scores(q, k, rows)
        top = np.maximum.reduce(s, -2, keepdims=True)
        s -= top
        np.exp(s, out=s)
        total = np.add.reduce(s, -2, keepdims=True)
        np.add(np.log(total), top, out=lse[..., rows])
        out = np.matmul(s.swapaxes(-1, -2), v[..., : rows.stop, :], out=scratch("out", (*q.shape[:3], s.shape[-1], v.shape[-1]), q.dtype))
        np.divide(out, total.swapaxes(-1, -2), out=o[..., rows, :])


def _backward(q, k, v, o, lse, do, dq, dk, dv):
    along = np.vecdot(do, o)[..., None, :]
    for rows in reversed(_blocks(q.shape[-2])):  # the last block meets all keys, and writes what the others add to
        keys, last = slice(0, rows.stop), rows.stop == q.shape[-2]
        p = _scores(q, k, rows)
        p -= lse[..., rows]
        np.exp(p, out=p)
        ds = np.matmul(v[..., keys, :], do[..., rows, :].swapaxes(-1, -2), out=scratch("ds", p.shape, p.dtype))
        ds -= along[..., rows]
        ds *= p
        _add(dv[..., keys, :], p, do[..., rows, :], last)
        _add(dk[..., keys, :], ds, q[..., rows, :], last)
        np.matmul(ds.swapaxes(-1, -2), k[..., keys, :], out=dq[..., rows, :])


def _add(total, a, b, first):
    """total += a·b, summed over the query heads that share a key/value head; with `first`, total is set."""
    if first and a.shape[2] == 1:
        np.matmul(a, b, out=total)
        return
    product = np.matmul(a, b, out=scratch("product", (*a.shape[:-1], b.shape[-1]), a.dtype))
    product = product if a.shape[2] == 1 else product.sum(2, keepdims=True)
    if first:
        total[...] = product
    else:
        total += product
