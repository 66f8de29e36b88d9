"""A few new tokens for each text, in a model so small that the calls around the products cost more than the products.

All blocks and the last norm run over plain arrays that are there already, with weights that were rewritten once so that fewer calls give
the same numbers:

    one product   query, key and value stand side by side, as do the maps into a gated MLP's inner width
    biases        are the weights of one more input that is always 1
    gains         a norm's x̂·g + b before a product with W is x̂ before one with W·diag(g), its bias larger by W·b
    centring      LayerNorm is RMSNorm of a row less its mean. Where all that is ever added to the row has mean 0, so has the row: that
                  much is taken from the weights of what adds to it, once, and not from the row, at every norm
    scales        1/√D of the scores into the query's weights, √C of the norms and the factors of GELU's polynomial into those beside them
    order         (inputs, outputs), which OpenBLAS multiplies a few rows with a quarter faster than (outputs, inputs)

The second and the fourth are the folding of Ashkboos et al. 2024 ("SliceGPT"), section 3. Rewritten weights belong to one key/value
cache and live as long. Its keys and values come from the weights as they were then, so who changes weights in the middle of a text begins
that text anew in any case. This is for blocks that normalise first; others, and larger models, where a copy costs more than calls, are
left to decode.py.

Measured on two cores of an AMD EPYC (Zen 4), NumPy 2.4.6, fp32, greedy, 4 layers of width 128, 16 tokens of prompt and 64 new ones,
2026-11-22, tokens/s:

    batch    transformers 5.23    block by block    here
    1        510-610              1910              2720-2790
    8        2900-3900            8400              12200-13200

At batch 8 that is 590 to 620 µs a token: products 170 (30 % more than from the L2 cache, which is too small for all weights), scores,
softmax and mean 115, norms 35, GELU 35, the other calls in the blocks 20; embedding 30, head 45, choosing the token 60, the loop's own
Python 20; and the token's share of reading the prompt 40 and of rewriting the weights 25.

Tried: memory in one piece, for rewritten weights and for the cache, 2,000 page faults less a text and 50 µs a token. Without gain: texts of
the prompt shared out over two threads (BLAS's own do as well), q·k by vecdot or matvec. Not taken: the head's weights in the other order
(5 µs, a copy of the largest matrix), embedding without the ops (up to 20 µs).
"""
import math
from weakref import WeakKeyDictionary

import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach_module
from tinyllm.kernels.cpu.decode import NORMS, ROWS, attend, hidden_keys
from tinyllm.kernels.cpu.few_rows import product
from tinyllm.kernels.known import INPUTS, known
from tinyllm.nn.cache import KVCache
from tinyllm.nn.layers import LayerNorm
from tinyllm.nn.transformer import Block, Transformer
from tinyllm.ops import rope
from tinyllm.tensor import Tensor, recording

SMALL = 2**21  # weights in all blocks, up to which rewriting them takes no longer than three or four tokens
HUGE = 2**20  # numbers from which on NumPy asks the system for huge pages, which take a tenth of the time of small ones
LINE = 16  # numbers in a line of the cache: a matrix is transposed five times faster when that many rows are taken at a time
_folded: WeakKeyDictionary[KVCache, "_Folded"] = WeakKeyDictionary()


@attach_module(Transformer, "stack")
def stack(model, x, around):
    """`Transformer.stack` for a few new positions after those in a cache, in fp32 or float64, no graph.     (B, T, C) -> (B, T, C)"""
    B, T, C = x.shape
    if around.cache is None or B * T > ROWS or around.rng is not None or recording():
        return NotImplemented
    folded = _folded.get(around.cache)
    if folded is None or folded.model is not model:
        if not _fits(model, x):
            return NotImplemented
        folded = _folded[around.cache] = _Folded(model)
    return Tensor(folded(x.data, around))


def _fits(model, x):
    """Whether the model is small and normalises first, and its layers are those that decode.py knows."""
    c = model.config
    return (
        c.layers * c.width * (4 * c.width + 2 * c.mlp_width) <= SMALL
        and type(model.norm) in NORMS
        and all(type(block) is Block and block.order is Block._pre and known(block, x) for block in model.blocks)
        and all(block.attention.settings == model.blocks[0].attention.settings for block in model.blocks)
        and all(type(norm) is type(model.norm) for block in model.blocks for norm in (block.attention_norm, block.mlp_norm))
    )


class _Folded:
    """A model's blocks with rewritten weights, and the arrays that they are computed in."""

    def __init__(self, model):
        self.model, self.room = model, None
        self.centred = type(model.norm) is LayerNorm
        space = _Space(model)
        self.blocks = [_Weights(block, self.centred, space) for block in model.blocks]

    def __call__(self, x, around):
        """(B, T, C) -> (B, T, C)"""
        B, T, C = x.shape
        if self.room is None or self.room.shape != (B, T):
            self.room = _Room(self.blocks[0], B, T, x.dtype)
        x = x.reshape(B * T, C)
        x = x - np.add.reduce(x, -1, keepdims=True) / C if self.centred else x.copy()
        [start] = {layer.reserve(T) for layer in around.cache.layers}  # all blocks have seen the same
        hidden = hidden_keys(around.cache, self.blocks[0].window, start, T)
        for w, layer in zip(self.blocks, around.cache.layers, strict=True):
            _attention(w, x, layer.keys[:, :, : layer.used], layer.values[:, :, : layer.used], hidden, around.rotation, self.room)
            _mlp(w, x, self.room)
        return _last(self.model.norm, x, self.room).reshape(B, T, C)


def _attention(w, x, keys, values, hidden, rotation, room):
    """x ← x + attention(norm(x)), writing the last T keys and values.     (N, C), (B, G, S, D) twice"""
    T = room.shape[1]
    _normalise(x, w.attention_eps, room)
    product(room.normal, w.query_key_value, room.joined)
    q, k = room.queries, room.keys
    if w.gain is not None or rotation is not None:
        turned = w.turned(room.queries_keys, rotation)
        q, k = turned[:, : w.heads], turned[:, w.heads :]
    keys[:, :, -T:], values[:, :, -T:] = k, room.values
    attend(q.reshape(room.means.shape), keys, values, hidden, w.slopes, w.softcap, out=room.means)
    product(room.mean, w.output, room.result)
    x += room.result


def _mlp(w, x, room):
    """x ← x + mlp(norm(x))"""
    _normalise(x, w.mlp_eps, room)
    product(room.normal, w.up, room.up)
    w.activate(w.activation, room)
    product(room.active, w.down, room.result)
    x += room.result


def _last(norm, x, room):
    """The model's last norm.     (N, C) -> (N, C)"""
    _normalise(x, norm.eps, room)
    y = room.normal_x * (norm.weight.data * math.sqrt(x.shape[1]))
    return y if _shift(norm) is None else y + _shift(norm)


def _shift(norm):
    """A norm's bias, or None."""
    return norm.bias.data if type(norm) is LayerNorm and norm.bias is not None else None


class _Space:
    """One array for the rewritten weights of all blocks: the system hands out a large one in few, huge pages."""

    def __init__(self, model):
        weights = sum(p.size + p.shape[0] for block in model.blocks for _, p in block.named_parameters())
        self.left = np.empty(max(weights, HUGE), model.embedding.weight.dtype)

    def take(self, *shape):
        taken, self.left = np.split(self.left, [math.prod(shape)])
        return taken.reshape(shape)


class _Weights:
    """A block's weights, rewritten: (inputs + 1, outputs) each, the biases in the last row."""

    def __init__(self, block, centred, space):
        a, mlp = block.attention, block.mlp
        D, dtype = a.head_width, a.query.weight.dtype
        self.attention_eps, self.mlp_eps = block.attention_norm.eps, block.mlp_norm.eps
        self.window, self.softcap = a.settings["window"], a.settings["softcap"]
        self.heads, self.groups, self.head_width = len(a.query.weight.data) // D, len(a.key.weight.data) // D, D
        self.slopes = None if a.slopes is None else a.slopes.astype(dtype).reshape(self.groups, -1, 1, 1)
        self.query_key_value = _reading(space, block.attention_norm, a.query, a.key, a.value)
        self.gain, self.eps = None, None
        if a.query_norm is None:
            self.query_key_value[:, : self.heads * D] *= D**-0.5
        else:
            norms = [a.query_norm] * self.heads + [a.key_norm] * self.groups
            self.gain = np.stack([norm.weight.data for norm in norms])[:, None] * math.sqrt(D)  # (H + G, 1, D)
            self.gain[: self.heads] *= D**-0.5
            self.eps = np.array([D * norm.eps for norm in norms], dtype)[:, None, None]
        self.output = _writing(space, a.output, centred)
        self.activation, (self.activate, before, after) = mlp.activation, ACTIVATIONS.get(mlp.activation, (_any, 1, 1))
        self.up = _reading(space, block.mlp_norm, *INPUTS[type(mlp)](mlp))
        self.up *= before
        self.down = _writing(space, mlp.down, centred)
        self.down[:-1] *= after

    def turned(self, x, rotation):
        """Queries and keys normalised and turned, where they are.     (B, H + G, T, D)"""
        if self.gain is not None:
            x = x * (self.gain / np.sqrt(np.vecdot(x, x)[..., None] + self.eps))
        return x if rotation is None else rope.array(x, *rotation)[0]


def _reading(space, norm, *linears):
    """The matrix of linear maps side by side, after a norm that no longer has gain, bias, or the √C of its root.     -> (C + 1, outputs)"""
    w = _transposed(space, *linears)
    if _shift(norm) is not None:
        w[-1] += _shift(norm) @ w[:-1]
    w[:-1] *= (norm.weight.data * math.sqrt(len(norm.weight.data)))[:, None]
    return w


def _writing(space, linear, centred):
    """The matrix of a linear map whose result is added to the row; with `centred`, one of mean 0.     -> (inputs + 1, C)"""
    w = _transposed(space, linear)
    if centred:
        C = w.shape[1]
        w -= w @ np.full((C, 1), 1 / C, w.dtype)
    return w


def _transposed(space, *linears):
    """Linear maps of the same inputs side by side, the biases below.     (M, K), (M,) each -> (K + 1, all M)"""
    weights = [linear.weight.data for linear in linears]
    joined = space.take(weights[0].shape[1] + 1, sum(map(len, weights)))
    column = 0
    for linear, w in zip(linears, weights, strict=True):
        for start in range(0, len(w), LINE):
            part = w[start : start + LINE]
            joined[:-1, column + start : column + start + len(part)] = part.T
        joined[-1, column : column + len(w)] = 0 if linear.bias is None else linear.bias.data
        column += len(w)
    return joined


class _Room:
    """The arrays for B texts of T new positions each, N = B·T, and views of them; those that enter a product have a last column of ones."""

    def __init__(self, weights, B, T, dtype):
        N, H, G, D = B * T, weights.heads, weights.groups, weights.head_width
        C, inner, F = weights.output.shape[1], weights.up.shape[1], len(weights.down) - 1
        self.shape = (B, T)
        self.square, self.result = np.empty(N, dtype), np.empty((N, C), dtype)
        self.joined, self.up = np.empty((N, (H + 2 * G) * D), dtype), np.empty((N, inner), dtype)
        self.normal, self.mean, self.active = (np.ones((N, width + 1), dtype) for width in (C, H * D, F))
        self.root, self.normal_x, self.active_x = self.square[:, None], self.normal[:, :C], self.active[:, :F]
        heads = self.joined.reshape(B, T, H + 2 * G, D).swapaxes(1, 2)
        self.queries_keys, self.values = heads[:, : H + G], heads[:, H + G :]
        self.queries, self.keys = heads[:, :H], heads[:, H : H + G]
        self.means = self.mean[:, : H * D].reshape(B, T, G, H // G, D).transpose(0, 2, 3, 1, 4)
        self.inputs = [self.up[:, i : i + F] for i in range(0, inner, F)]
        self.tanh = np.empty((N, F), dtype)


def _normalise(x, eps, room):
    """room.normal ← x/√(Σx² + C·eps)"""
    np.vecdot(x, x, out=room.square)
    room.square += x.shape[1] * eps
    np.sqrt(room.square, out=room.square)
    np.divide(x, room.root, out=room.normal_x)


def _any(activation, room):
    """room.active ← f(…), by the op."""
    room.active_x[...] = activation.run(*room.inputs)[0]


def _gelu_tanh(_, room):
    """room.active ← v·(1 + tanh(v³ + b·v)): `ops.gelu_tanh` where v = a·x, and the result stands for itself times 2a."""
    v, t = room.up, room.tanh
    np.multiply(v, v, out=t)
    t += GELU_B
    t *= v
    np.tanh(t, out=t)
    t += 1
    np.multiply(t, v, out=room.active_x)


GELU_A = (math.sqrt(2 / math.pi) * 0.044715) ** (1 / 3)  # (a·x)³ + b·a·x is the tanh's argument
GELU_B = math.sqrt(2 / math.pi) / GELU_A
ACTIVATIONS = {ops.gelu_tanh: (_gelu_tanh, GELU_A, 0.5 / GELU_A)}  # the function, and factors for the weights before and after it
