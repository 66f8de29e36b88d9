"""A few new tokens for each text: a block's forward over plain arrays, where the key/value cache holds everything before.

With one position a row, every matrix is read once for a handful of multiplications, and what counts is the weights' way from memory and
the calls around the products. In large models each core therefore takes its heads, and then its part of the MLP's width, through all
that follows up to the product that mixes them (query, key, value, scores, mean, output; up, activation, down), and the cores' results
are added in order: two meetings a block, where sharing out every product would take six. This is the cut of Shoeybi et al. 2019
("Megatron-LM"), between cores. What a block does with its parts, `Block.order`, is run as it stands, with array functions for layers.
Weights are read where they lie: nothing is copied, so nothing can be stale.

Measured on two cores of an AMD EPYC (Zen 4), NumPy 2.4.6, fp32, greedy, 16 tokens of prompt and 64 new ones, 2026-11-22, tokens/s:

                              batch    by the ops' kernels    here    transformers 5.23    what bounds it
    GPT-2 124M                    1                     40   49-52                26-27    498 MB of weights a token, at 26 GB/s
                                  8                     65     209               93-101    the same at 14 GB/s: eight times the arithmetic
    4 layers, width 128           1                    920    1900              620-720    300 calls of NumPy; folded.py has fewer
                                  8                   4100    8400            3300-4500    the same

Tried, the twelve blocks of 124M, ms a token:   batch 1   BLAS's threads 13.6   heads and columns a core 20   one core 23   each product shared 26
                                                batch 8   heads and columns a core 22.8   each product shared 28   one core 35   BLAS's threads 41
Without gain: keys as (B, G, D, S), three times slower at 80 positions; two threads below SHARE, where handing over costs what it saves.
Not taken: q, k and v in one product, 5 to 10 µs a block where their weights are neighbours, and a copy of them where they are not.
"""
import math

import numpy as np

from tinyllm.kernels import attach_module
from tinyllm.kernels.cpu.few_rows import MOST, times
from tinyllm.kernels.known import INPUTS, known
from tinyllm.nn.layers import LayerNorm, RMSNorm
from tinyllm.nn.transformer import Block
from tinyllm.ops import rope
from tinyllm.ops.attention import visible
from tinyllm.tensor import Tensor, recording
from tinyllm.threads import parallel, threads

ROWS = 256  # with more, calls no longer count, and the ops' own kernels are the faster
SHARE = 2**21  # multiplications that a core must get for waking it to pay
LOWEST = float(np.finfo(np.float32).min)


@attach_module(Block)
def decode(block, x, around, layer):
    """`Block.forward` for a few new positions after those in a cache, in fp32 or float64, no graph.     (B, T, C) -> (B, T, C)"""
    B, T, C = x.shape
    if around.cache is None or B * T > ROWS or around.rng is not None or recording() or not known(block, x):
        return NotImplemented
    return Tensor(block.order(_Parts(block), x.data.reshape(B * T, C), around, layer).reshape(B, T, C))


class _Parts:
    """A block's layers as functions of arrays (N, C), N = B·T: what `Block.order` finds in place of the block."""

    def __init__(self, block):
        self.block, self.dropout, self.stored = block, block.dropout, block.stored

    def attention_norm(self, x):
        return NORMS[type(self.block.attention_norm)](self.block.attention_norm, x)

    def attention(self, x, around, layer):
        return _attention(self.block.attention, x, around, layer)

    def mlp_norm(self, x):
        return NORMS[type(self.block.mlp_norm)](self.block.mlp_norm, x)

    def mlp(self, x, rng):
        return _mlp(self.block.mlp, x)


def _attention(a, x, around, layer):
    """`Attention.forward`.     (N, C) -> (N, C)"""
    cache = around.cache.layers[layer]
    B, G, _, D = cache.keys.shape
    T = len(x) // B
    share = len(a.query.weight.data) // (G * D)  # query heads that look at the same keys
    start = cache.reserve(T)
    new, seen = slice(start, start + T), slice(0, start + T)
    hidden = hidden_keys(around.cache, a.settings["window"], start, T)

    def heads(groups):
        """What the query heads of these key/value heads add to the result."""
        columns, queries = _scaled(groups, D), _scaled(groups, share * D)
        k = _rows(a.key, x, columns).reshape(B, T, -1, D).swapaxes(1, 2)
        q = _rows(a.query, x, queries).reshape(B, T, -1, D).swapaxes(1, 2)
        cache.keys[:, groups, new] = _turned(k, a.key_norm, around)
        cache.values[:, groups, new] = _rows(a.value, x, columns).reshape(B, T, -1, D).swapaxes(1, 2)
        q = _turned(q, a.query_norm, around).reshape(B, -1, share, T, D) * (1 / math.sqrt(D))
        slopes = None if a.slopes is None else a.slopes[_scaled(groups, share)].astype(x.dtype).reshape(-1, share, 1, 1)
        o = attend(q, cache.keys[:, groups, seen], cache.values[:, groups, seen], hidden, slopes, a.settings["softcap"])
        return times(o.reshape(B, -1, T, D).swapaxes(1, 2).reshape(len(x), -1), a.output.weight.data[:, queries])

    return _biased(_added(heads, G, 2 * (share + 1) * D * x.shape[1], len(x)), a.output)


def hidden_keys(cache, window, start, T):
    """Which keys each new position may not see, as an array that broadcasts over (B, G, R, T, S); None where it sees all."""
    S = start + T
    hidden = None
    if T > 1 or window is not None:
        hidden = ~visible(np.arange(start, S), np.arange(S), window=window)
    padding = cache.padding_mask(S, T)
    if padding is None:
        return hidden
    padding = ~padding[:, None, None, None]
    return padding if hidden is None else hidden | padding


def attend(q, k, v, hidden, slopes, softcap, out=None):
    """Each query's mean of the values, as in ops/attention.py; q comes scaled.     (B, G, R, T, D), (B, G, S, D) twice -> (B, G, R, T, D)"""
    B, G, R, T, D = q.shape
    S = k.shape[2]
    s = q.reshape(B, G, R * T, D) @ k.swapaxes(2, 3)
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    by_position = s.reshape(B, G, R, T, S)
    if slopes is not None:
        by_position -= slopes * np.abs(np.arange(S - T, S)[:, None] - np.arange(S)).astype(s.dtype)
    if hidden is not None:
        np.copyto(by_position, -math.inf, where=hidden)
    top = np.maximum.reduce(s, -1, keepdims=True)
    s -= top if hidden is None else np.maximum(top, LOWEST)  # a query that sees nothing: e^-inf, not e^NaN
    np.exp(s, out=s)
    total = np.add.reduce(s, -1, keepdims=True)
    if hidden is not None:
        np.maximum(total, 1, out=total)  # the likeliest alone has e^0 = 1, so less than that is nothing at all
    return np.divide((s @ v).reshape(q.shape), total.reshape(B, G, R, T, 1), out=out)


def _turned(x, norm, around):
    """`Attention`'s norm of queries and keys, and RoPE, where there are such.     (B, heads, T, D)"""
    x = x if norm is None else _rmsnorm(norm, x)
    return x if around.rotation is None else rope.array(x, *around.rotation)[0]


def _mlp(mlp, x):
    """`MLP.forward` and `GatedMLP.forward`.     (N, C) -> (N, C)"""
    inputs, down, activation = INPUTS[type(mlp)](mlp), mlp.down.weight.data, mlp.activation.run

    def columns(part):
        """What this part of the inner width adds to the result."""
        return times(activation(*[_rows(linear, x, part) for linear in inputs])[0], down[:, part])

    return _biased(_added(columns, down.shape[1], (len(inputs) + 1) * x.shape[1], len(x)), mlp.down)


def _added(work, length, cost, rows):
    """Σ work(part) over the cores' parts of `length`, in their order.

    cost : multiplications a row of x for each of the `length`.     rows : of x. A single one, or many, are a part by themselves: BLAS
    shares out their products well, and without Python's threads.
    """
    if not 1 < rows <= MOST or length * cost * rows < 2 * SHARE:
        return work(slice(0, length))
    found = [None] * threads()

    def keep(part, number):
        found[number] = work(part)

    parallel(keep, length, -(-SHARE // (cost * rows)))
    total = found[0]
    for y in found[1:]:
        if y is not None:
            total += y
    return total


def _rows(linear, x, rows):
    """Some columns of a Linear's result.     (N, K) -> (N, rows)"""
    y = times(x, linear.weight.data[rows])
    if linear.bias is not None:
        y += linear.bias.data[rows]
    return y


def _biased(y, linear):
    if linear.bias is not None:
        y += linear.bias.data
    return y


def _scaled(part, factor):
    return slice(part.start * factor, part.stop * factor)


def _layernorm(norm, x):
    y = _rmsnorm(norm, x - np.add.reduce(x, -1, keepdims=True) / x.shape[-1])
    if norm.bias is not None:
        y += norm.bias.data
    return y


def _rmsnorm(norm, x):
    """x·w/√(Σx²/C + eps), with C taken out of the root.     (..., C) -> (..., C)"""
    C = x.shape[-1]
    y = x * (math.sqrt(C) / np.sqrt(np.vecdot(x, x) + C * norm.eps))[..., None]
    y *= norm.weight.data
    return y


NORMS = {LayerNorm: _layernorm, RMSNorm: _rmsnorm}
