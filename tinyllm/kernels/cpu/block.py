"""A whole transformer block, forward and backward in one, made of the other kernels.

What one function for the block saves: the engine's work for some twenty ops; a pass over memory for each residual sum; and above all
memory. Of the arrays of (B·T, width) that a block's ops keep for their backwards, six of sixteen are computed again from what is left,
in the cache and without a product:

                             by ops   here
    the norms' inputs             2      2      x, and x after attention
    normalised                    2      -      again from x, its mean and 1/σ
    q, k, v                       3      3      after RoPE
    attention's output            1      1
    inside the MLP                4      4      gated: two of 8/3
    its activation                4      -      comes out of the activation's backward, which needs the same tanh

q, k and v come from one product where their weights lie side by side in memory, as they do in an optimizer's flat parameters. Made for
blocks that normalise first, in full precision, without dropout; with documents that share rows, each of them in one piece. Others run as
they are written in `tinyllm.nn`.
"""
import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach_module
from tinyllm.kernels.cpu import activations, attention, norms, rope
from tinyllm.kernels.cpu.linear import column_sums, times, weight_gradient
from tinyllm.kernels.known import known
from tinyllm.nn.layers import LayerNorm
from tinyllm.nn.transformer import Block
from tinyllm.tensor import op

LINEAR = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.gate", "mlp.up", "mlp.down")
NAMES = tuple(f"{layer}.{kind}" for layer in ("attention_norm", "mlp_norm", *LINEAR) for kind in ("weight", "bias"))
NUMBER = {name: i for i, name in enumerate(("x", *NAMES))}


@attach_module(Block)
def block(module, x, around, layer):
    """`nn.Block`'s forward."""
    if not _fits(module, around, x):
        return NotImplemented
    a, mlp, norm = module.attention, module.mlp, module.attention_norm
    seen, turned = _of_all_layers(around, x.shape[1], a)
    if seen is None:
        return NotImplemented
    layers = (norm, module.mlp_norm, a.query, a.key, a.value, a.output, getattr(mlp, "gate", None), mlp.up, mlp.down)  # as in NAMES
    parameters = (getattr(layer, kind, None) for layer in layers for kind in ("weight", "bias"))
    return fused_block(
        x, *parameters, head_width=a.head_width, centre=type(norm) is LayerNorm, eps=norm.eps, turned=turned, seen=seen
    )  # fmt: skip


def _fits(module, around, x) -> bool:
    a = module.attention
    return (
        known(module, x)
        and module.order is Block._pre
        and not (module.dropout and around.rng is not None)
        and around.cache is None
        and a.slopes is None
        and a.query_norm is None
        and a.settings["softcap"] is None
        and module.mlp.activation in (ops.gelu_tanh, ops.swiglu)
        and x.shape[1] > 1
        and x.size >= 2**12
        and len({layer.bias is None for layer in (a.query, a.key, a.value)}) == 1
        and (type(module.attention_norm), module.attention_norm.eps) == (type(module.mlp_norm), module.mlp_norm.eps)
    )


def _of_all_layers(around, T, a):
    """Who sees whom, and RoPE's tables (None without): made in the first layer, found again in the others."""
    window, heads = a.settings["window"], (len(a.query.weight.data) + len(a.key.weight.data)) // a.head_width
    key = (T, window, heads)
    if key not in around.notes:
        turned = around.rotation and rope.tables(*around.rotation, heads)
        around.notes[key] = attention.sight(T, around.documents, causal=around.causal, window=window), turned
    return around.notes[key]


@op
def fused_block(*arrays, head_width, centre, eps, turned, seen):
    """y = x' + mlp(norm(x')) with x' = x + attention(norm(x)).     x (B, T, C), the parameters in the order of NAMES -> (B, T, C)

    turned : RoPE's `tables` for queries and keys, or None.     seen : which keys each query sees, an `attention.Sight`.
    """
    shape = arrays[0].shape
    x, p = np.ascontiguousarray(arrays[0]).reshape(-1, shape[2]), dict(zip(NAMES, arrays[1:], strict=True))
    h = np.empty_like(x)
    first = _norm(p, "attention_norm", x, centre, eps, h)
    qkv = times(h, _side_by_side(p, "weight").T)
    if p["attention.query.bias"] is not None:
        qkv += _side_by_side(p, "bias")
    q, k, v = _heads(qkv, shape, head_width, p)
    qkv[:, : shape[2]] *= head_width**-0.5  # q, as `attention.forward` takes it
    _turn(qkv, turned, shape, head_width, 1)
    o = attention.like_heads(q)
    lse = attention.forward(q, k, v, o, seen)
    middle = _linear(p, "attention.output", _merged(o), out=h)
    middle += x
    h = np.empty_like(x)
    second = _norm(p, "mlp_norm", middle, centre, eps, h)
    up, gate = _linear(p, "mlp.up", h), None if p["mlp.gate.weight"] is None else _linear(p, "mlp.gate", h)
    active = np.empty_like(up)
    _activate(up, gate, active)
    y = _linear(p, "mlp.down", active, out=h)
    y += middle

    def backward(dy):
        dy = np.ascontiguousarray(dy).reshape(x.shape)
        d_middle = np.empty_like(x)
        yield from _mlp_backward(p, dy, middle, second, up, gate, d_middle)
        dx = np.empty(shape, x.dtype)
        yield from _attention_backward(p, d_middle, x, first, (q, k, v, o, lse, seen), turned, dx.reshape(x.shape))
        yield NUMBER["x"], dx

    return y.reshape(shape), backward


def _mlp_backward(p, dy, x, statistics, up, gate, dx):
    """Yield the gradients of the MLP's parameters and write dx = dy + norm's and MLP's backward of dy."""
    d_up = times(dy, p["mlp.down.weight"])
    active = np.empty_like(up)
    if gate is None:
        activations.gelu_backward(up, d_up, active)
    else:
        d_gate = np.empty_like(up)
        activations.swiglu_backward(gate, up, d_up, d_gate, active)
    yield from _weights("mlp.down", dy, active)
    del active
    dh = times(d_up, p["mlp.up.weight"])
    if gate is not None:
        dh += times(d_gate, p["mlp.gate.weight"])
    yield from _norm_backward("mlp_norm", p, dh, x, statistics, dx, dy)
    h = dh  # which holds the norm's result again
    yield from _weights("mlp.up", d_up, h)
    if gate is not None:
        yield from _weights("mlp.gate", d_gate, h)


def _attention_backward(p, dy, x, statistics, kept, turned, dx):
    """The same for attention."""
    q, k, v, o, lse, seen = kept
    yield from _weights("attention.output", dy, _merged(o))
    do = times(dy, p["attention.output.weight"])
    joined = np.empty((len(x), sum(part.shape[1] for part in (q, k, v)) * q.shape[3]), x.dtype)
    shape = (q.shape[0], q.shape[2], x.shape[1])
    dq, dk, dv = _heads(joined, shape, q.shape[3], p)
    attention.backward(q, k, v, o, lse, do.reshape(o.swapaxes(1, 2).shape).swapaxes(1, 2), dq, dk, dv, seen)
    joined[:, : x.shape[1]] *= q.shape[3] ** -0.5
    _turn(joined, turned, shape, q.shape[3], -1)
    dh = times(joined, _side_by_side(p, "weight"), out=do)
    yield from _norm_backward("attention_norm", p, dh, x, statistics, dx, dy)
    start = 0
    for name in LINEAR[:3]:
        part = joined[:, start : start + len(p[f"{name}.weight"])]
        yield from _weights(name, part, dh)  # which holds the norm's result again
        start += part.shape[1]


def _norm(p, name, x, centre, eps, y):
    return norms.forward(x, p[f"{name}.weight"], p[f"{name}.bias"], eps, centre, y)


def _norm_backward(name, p, dh, x, statistics, dx, plus):
    """Write dx = plus + norm's backward of dh, and the norm's result into dh."""
    w, b = p[f"{name}.weight"], p[f"{name}.bias"]
    dw, db = norms.backward(dh, x, statistics, w, dx, b, y=dh, plus=plus)
    yield NUMBER[f"{name}.weight"], dw
    yield NUMBER[f"{name}.bias"], db


def _linear(p, name, x, out=None):
    y = times(x, p[f"{name}.weight"].T, out=out)
    if p[f"{name}.bias"] is not None:
        y += p[f"{name}.bias"]
    return y


def _weights(name, dy, x):
    yield NUMBER[f"{name}.weight"], weight_gradient(dy, x)
    yield NUMBER[f"{name}.bias"], lambda: column_sums(dy)


def _activate(up, gate, y):
    if gate is None:
        activations.gelu_forward(up, y)
    else:
        activations.swiglu_forward(gate, up, y)


def _heads(joined, shape, head_width, p):
    """Views of (B·T, C + 2·G·D) as q, k and v.     -> (B, H, T, D), (B, G, T, D) twice"""
    edges = np.cumsum([len(p[f"{name}.weight"]) for name in LINEAR[:2]])
    return [part.reshape(*shape[:2], -1, head_width).swapaxes(1, 2) for part in np.split(joined, edges, axis=1)]


def _merged(o):
    """(B, H, T, D), lying as (B, T, H, D) -> (B·T, H·D)"""
    return o.swapaxes(1, 2).reshape(-1, o.shape[1] * o.shape[3])


def _turn(joined, turned, shape, head_width, direction):
    """RoPE in place of the queries and keys in (B·T, C + 2·G·D); back again with direction -1."""
    if turned is not None:
        rope.turn(joined[:, : turned[0].shape[1]].reshape(*shape[:2], -1), *turned, head_width, direction)


def _side_by_side(p, kind):
    """The three projections' weights (or biases) one below the other: a view where they lie so in memory, else a copy."""
    arrays = [p[f"{name}.{kind}"] for name in LINEAR[:3]]
    base = arrays[0].base
    flat = isinstance(base, np.ndarray) and base.ndim == 1 and base.flags.c_contiguous and base.dtype == arrays[0].dtype
    if flat and all(x.base is base and x.flags.c_contiguous for x in arrays):
        places = [x.__array_interface__["data"][0] for x in arrays]
        if all(place + x.nbytes == following for place, x, following in zip(places, arrays, places[1:], strict=False)):
            start = (places[0] - base.__array_interface__["data"][0]) // base.itemsize
            return base[start : start + sum(x.size for x in arrays)].reshape(-1, *arrays[0].shape[1:])
    return np.concatenate(arrays)
