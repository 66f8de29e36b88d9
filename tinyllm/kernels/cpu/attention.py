"""Attention among the tokens of a row, one block of queries of a few heads at a time, heads shared out over the cores.

A query sees the keys of one stretch, its `Sight`: causal, a window and documents that lie side by side in the row are all of that form.
A block of queries multiplies only with the keys from the first to the last that one of them sees: under a causal mask, nearly half of the
products and exponentials of the definition are never made. Scores of one block stay in the cache; kept for the backward are the output
and one number a query, as in `ops.tiled_attention`, whose formulas these are. Offsets, padding, documents in pieces, ALiBi and the soft
cap go to the op.

Scores lie transposed, keys down and queries across: the largest and the sum over all keys are then taken over whole rows of memory,
several times faster than along rows of 64 or 256, and what belongs to a query is added to a row as it stands. 1/√D multiplies q, which
is smaller than the scores, before all else. Measured, one core of an AMD EPYC (Zen 4), forward and backward:

    rows, heads, T, D      this             scores as rows     one head a time
    6, 4, 64, 32           0.42 + 0.64 ms   0.55 + 0.87 ms     0.94 + 1.19 ms
    4, 6, 256, 64          5.7 + 11.0 ms    6.6 + 13.7 ms      7.1 + 13.6 ms
"""
import math
from functools import cached_property, lru_cache

import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach, packed
from tinyllm.kernels.cpu.blocks import scratch
from tinyllm.threads import parallel

ROWS = 64  # queries in a block
SCORES = 2**17  # of a block of several heads: 512 KB in float32, half of a usual second-level cache
SHARE = 2**19  # scores that a core must get for waking it to pay
SEEN, HIDDEN = np.float32(0), np.float32(-math.inf)  # added to a score


class Sight:
    """Which keys each query sees: those from `first` to before `after`.     (B, T) int each, or (1, T) where all rows are alike

    Neither ever falls along a row, and every query sees itself.
    """

    def __init__(self, first: np.ndarray, after: np.ndarray):
        self.first, self.after, self.parts = first, after, {}

    def of(self, rows: slice) -> "Sight":
        """That of some rows of the batch, which the backward asks for again."""
        if len(self.first) == 1:
            return self
        place = rows.start, rows.stop
        if place not in self.parts:
            self.parts[place] = Sight(self.first[rows], self.after[rows])
        return self.parts[place]

    @cached_property
    def blocks(self) -> list[tuple[slice, slice, list]]:
        """For each block of queries the keys from the first to the last that one of them sees, and what hides those that not all see:
        pairs of some of these keys and an array of 0 and -inf to be added to their scores.     (B, 1, 1, keys, queries)
        """
        T = self.first.shape[1]
        step = ROWS if (self.after - self.first).mean() >= ROWS else ROWS // 2  # where little is seen, a large block would see much in vain
        return [self._block(slice(start, min(start + step, T))) for start in range(0, T, step)]

    def _block(self, queries):
        first, after = self.first[:, queries], self.after[:, queries]
        keys = slice(int(first[:, 0].min()), int(after[:, -1].max()))
        at = np.arange(keys.start, keys.stop)[:, None]
        begin, end = slice(int(first[:, -1].max()) - keys.start), slice(int(after[:, 0].min()) - keys.start, len(at))
        edges = (begin, at[begin] < first[:, None]), (end, at[end] >= after[:, None])
        return queries, keys, [(part, np.where(hidden, HIDDEN, SEEN)[:, None, None]) for part, hidden in edges if hidden.size]


@lru_cache(8)
def _by_position(T, causal, window) -> Sight:
    """`ops.visible` of T queries and as many keys."""
    at = np.arange(T)[None]
    reach = T if window is None else window
    return Sight(np.maximum(at - (reach - 1), 0), at + 1 if causal else np.minimum(at + reach, T))


def sight(T: int, documents=None, *, causal: bool = True, window: int | None = None) -> Sight | None:
    """What each of T queries sees of as many keys, by position and by its document's number (B, T).

    None where it is no stretch with the query inside: a document in pieces, or a window of nothing.
    """
    if window is not None and window < 1:
        return None
    plain = _by_position(T, causal, window)
    if documents is None:
        return plain
    of_document = packed.edges(documents)
    return of_document and Sight(np.maximum(plain.first, of_document[0]), np.minimum(plain.after, of_document[1]))


@attach(ops.attention, at_least=2**12)
def attention(q, k, v, padding=None, documents=None, slopes=None, *, causal=True, window=None, offset=0, softcap=None, scale=None):
    """`ops.attention` where each query sees a stretch of as many keys as there are queries."""
    plain = padding is None and slopes is None and softcap is None and offset == 0
    fits = plain and q.shape[2] == k.shape[2] > 1 and q.shape[1] % k.shape[1] == 0
    seen = sight(q.shape[2], documents, causal=causal, window=window) if fits else None
    if seen is None:
        return ops.attention.array(
            q, k, v, padding, documents, slopes, causal=causal, window=window, offset=offset, softcap=softcap, scale=scale
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scaled = np.multiply(q, scale, out=like_heads(q))
    o = like_heads(q)
    lse = forward(scaled, k, v, o, seen)

    def gradient(do):
        dq, dk, dv = like_heads(q), like_heads(k), like_heads(v)
        backward(scaled, k, v, o, lse, do, dq, dk, dv, seen)
        return np.multiply(dq, scale, out=dq), dk, dv, None, None, None

    return o, gradient


def like_heads(x):
    """An empty (B, H, T, D) array whose memory lies as (B, T, H, D), so that merging the heads afterwards copies nothing."""
    B, H, T, D = x.shape
    return np.empty((B, T, H, D), x.dtype).swapaxes(1, 2)


def forward(q, k, v, o, seen):
    """Write o; return the log of each query's sum of exponentials. q is scaled already.     (B, H, T, D), (B, G, T, D) twice -> (B, G, H/G, 1, T)"""
    groups = k.shape[1]
    q, k, v, o = _grouped(q, groups), _grouped(k, groups), _grouped(v, groups), _grouped(o, groups)
    lse = np.empty((*q.shape[:3], 1, q.shape[3]), q.dtype)
    _share_out(lambda unit: _forward(q[unit], k[unit], v[unit], o[unit], lse[unit], seen.of(unit[0])), q)
    return lse


def backward(q, k, v, o, lse, do, dq, dk, dv, seen):
    """Write dq (of the scaled q), dk and dv."""
    groups = k.shape[1]
    arrays = [_grouped(x, groups) for x in (q, k, v, o, do, dq, dk, dv)]

    def work(unit):
        q, k, v, o, do, dq, dk, dv = (x[unit] for x in arrays)
        _backward(q, k, v, o, lse[unit], do, dq, dk, dv, seen.of(unit[0]))

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


def _scores(q, k, rows, keys, edges):
    """k·qᵀ of a block of queries, -inf where a query does not see the key.     -> (…, keys, rows)"""
    s = scratch("scores", (*q.shape[:3], keys.stop - keys.start, rows.stop - rows.start), q.dtype)
    np.matmul(k[..., keys, :], q[..., rows, :].swapaxes(-1, -2), out=s)
    for part, hidden in edges:
        s[..., part, :] += hidden
    return s


def _forward(q, k, v, o, lse, seen):
    for rows, keys, edges in seen.blocks:
        s = _scores(q, k, rows, keys, edges)
        top = np.maximum.reduce(s, -2, keepdims=True)
        s -= top
        np.exp(s, out=s)
        total = np.add.reduce(s, -2, keepdims=True)
        np.add(np.log(total), top, out=lse[..., rows])
        out = np.matmul(s.swapaxes(-1, -2), v[..., keys, :], out=scratch("out", (*q.shape[:3], s.shape[-1], v.shape[-1]), q.dtype))
        np.divide(out, total.swapaxes(-1, -2), out=o[..., rows, :])


def _backward(q, k, v, o, lse, do, dq, dk, dv, seen):
    along = np.vecdot(do, o)[..., None, :]
    for rows, keys, edges in reversed(seen.blocks):  # the last block meets the last key, and writes what the others add to
        last = rows.stop == q.shape[-2]
        p = _scores(q, k, rows, keys, edges)
        p -= lse[..., rows]
        np.exp(p, out=p)
        ds = np.matmul(v[..., keys, :], do[..., rows, :].swapaxes(-1, -2), out=scratch("ds", p.shape, p.dtype))
        ds -= along[..., rows]
        ds *= p
        if last:
            dk[..., : keys.start, :] = dv[..., : keys.start, :] = 0
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
