"""Attention, by its definition: each query takes a weighted mean of the values, weighted by how well it matches their keys.

    s = scale·q·kᵀ      p = softmax(s)      o = p·v                                   scale = 1/√D unless given

What a query may see (`visible`) is decided by positions and masks; invisible scores become -inf, so their weight is 0. A query that
sees nothing at all gets o = 0, and gradient 0.
"""
import math

from tinyllm.backend import array_module
from tinyllm.tensor import op


def visible(queries, keys, *, causal=True, window=None):
    """Which keys each query may see, by position.     (T,), (S,) int -> (T, S) bool

    causal : no key after the query.   window : only keys less than `window` positions away (the query's own position counts as one).
    """
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0 if causal else distance == distance
    if window is not None:
        seen &= (distance < window) & (distance > -window)
    return seen


@op
def attention(q, k, v, padding=None, documents=None, slopes=None, *, causal=True, window=None, offset=0, softcap=None, scale=None):
    """Scaled dot-product attention.     (B, H, T, D), (B, G, S, D), (B, G, S, D) -> (B, H, T, D)

    padding   : (B, S) bool (or 0 and 1), true where a key is a real token                  slopes : (H,) ALiBi: s -= slope·|distance|
    documents : (B, S) int, the document each key is from: a query sees its own only
    causal, window : see `visible`            softcap : s ← softcap·tanh(s/softcap)
    offset    : the first query's position among the keys: 0, or with a cache the number of keys that came before
    H is a multiple of G: H/G query heads share a key/value head (grouped; multi-query at G = 1).

    Backward.  With ds through the softmax as in softmax.py:
        dv = pᵀ·do      dp = do·vᵀ      ds = p·(dp - Σ dp·p)      dq = scale·ds·k      dk = scale·dsᵀ·q
    Shared heads add up. The soft cap multiplies ds by its slope, 1 - tanh².
    Sources: Vaswani et al. 2017; Ainslie et al. 2023 (grouped heads); Gemma Team 2024 (soft cap).
    """
    xp = array_module(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    qg = group_heads(q, k.shape[1])  # (B, G, R, T, D) with R = H/G
    bias = ScoreBias(xp, q, k, padding, documents, slopes, causal, window, offset)
    s, cap_slope = scores(qg, k[:, :, None], scale, softcap)
    s = bias.add_to(s, slice(None), slice(None))
    top = s.max(-1, keepdims=True)
    p = xp.exp(s - xp.where(xp.isfinite(top), top, xp.zeros_like(top)))
    total = p.sum(-1, keepdims=True)
    p /= xp.where(total == 0, xp.ones_like(total), total)  # a query that sees nothing: 0/1, not 0/0

    def backward(do):
        do = group_heads(do, k.shape[1])
        dv = (p.swapaxes(-1, -2) @ do).sum(2)
        dp = do @ v[:, :, None].swapaxes(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True))
        ds *= scale if cap_slope is None else scale * cap_slope
        dq = (ds @ k[:, :, None]).reshape(q.shape)
        dk = (ds.swapaxes(-1, -2) @ qg).sum(2)
        return dq, dk, dv, None, None, None

    return (p @ v[:, :, None]).reshape(q.shape), backward


def group_heads(q, groups):
    """Query heads side by side with the key/value head they share.     (B, H, T, D) -> (B, G, H/G, T, D)"""
    B, H, T, D = q.shape
    if H % groups:
        raise ValueError(f"attention: {H} query heads cannot share {groups} key/value heads evenly")
    return q.reshape(B, groups, H // groups, T, D)


def scores(q, k, scale, softcap):
    """scale·q·kᵀ, soft-capped, and the cap's slope (None without one).     (..., T, D), (..., S, D) -> (..., T, S)"""
    s = (q * scale) @ k.swapaxes(-1, -2)
    if softcap is None:
        return s, None
    t = array_module(s).tanh(s / softcap)
    return softcap * t, 1 - t * t


class ScoreBias:
    """What is added to a score because of where query and key stand: -inf where the query may not look, ALiBi's penalty where asked.

    Made for any block of queries and keys, so that the tiled form uses the same definition.
    """

    def __init__(self, xp, q, k, padding, documents, slopes, causal, window, offset):
        self.xp = xp
        self.padding, self.documents = (None if x is None else xp.asarray(x) for x in (padding, documents))  # may come from the host
        self.causal, self.window, self.offset = causal, window, offset
        self.keys = xp.arange(k.shape[2])
        self.queries = xp.arange(q.shape[2]) + offset
        self.slopes = None if slopes is None else xp.asarray(slopes, dtype=q.dtype).reshape(k.shape[1], -1, 1, 1)

    def hidden(self, rows, columns):
        """True where the query may not see the key, in a shape that broadcasts over (B, G, R, T, S); None where all is seen."""
        queries, keys = self.queries[rows], self.keys[columns]
        parts = []
        if self.causal or self.window is not None:
            parts.append(~visible(queries, keys, causal=self.causal, window=self.window)[None, None, None])
        if self.padding is not None:
            parts.append(self.padding[:, None, None, None, columns] == 0)
        if self.documents is not None:
            own = self.documents[:, queries]
            parts.append((own[:, :, None] != self.documents[:, None, columns])[:, None, None])
        hidden = parts[0] if parts else None
        for part in parts[1:]:
            hidden = hidden | part
        return hidden

    def add_to(self, s, rows, columns):
        """Scores (B, G, R, T, S) of a block, biased."""
        if self.slopes is not None:
            distance = self.queries[rows][:, None] - self.keys[columns][None, :]
            s = s - self.slopes * abs(distance).astype(s.dtype)
        hidden = self.hidden(rows, columns)
        return s if hidden is None else self.xp.where(hidden, self.xp.asarray(-math.inf, dtype=s.dtype), s)

    def sees_nothing(self, rows, columns) -> bool:
        """Whether positions alone hide the whole block, so that it can be skipped. Decided from its corners, without a mask."""
        first_query, last_query = int(rows.start) + self.offset, int(rows.stop) - 1 + self.offset
        first_key, last_key = int(columns.start), int(columns.stop) - 1
        future = self.causal and first_key > last_query
        past = self.window is not None and first_query - last_key >= self.window
        ahead = self.window is not None and first_key - last_query >= self.window
        return future or past or ahead
