"""A whole transformer block in 16 bits, forward and backward in one, made of the other kernels.

What one function for the block saves: the engine's work for some twenty ops; separate passes for residual sums (which the norms' kernels
add on their way), for biases and GELU (which cuBLASLt adds to its products); rounding the weights (products read their 16-bit copies, see
halves.py); and above all memory. Kept for the backward, in arrays of N·C 16-bit numbers, beside what a framework's autograd keeps when
every op keeps what it needs:

                             op by op   here
    the norms' inputs               2      2      x, and x after attention
    normalised                      2      -      made again from x, its mean and 1/σ: 4 bytes read and written for each number
    q, k, v                         3      3      after RoPE
    attention's output              1      1      and its log-sum-exp, one fp32 number a query
    inside the MLP                  4      4      gated: two of 8/3
    its activation                  4      -      made again from what is inside the MLP

q, k and v come from one product: their weights lie side by side in the copies that AdamW writes; elsewhere they are put together. Made for
blocks that normalise first, in fp16 or bf16, without dropout or cache; others run op by op, as they are written in `tinyllm.nn`.
"""
from tinyllm import ops
from tinyllm.backend import array_module, deterministic, is_half
from tinyllm.kernels import attach_module
from tinyllm.kernels.cuda import activations, attention, halves, norms, rope
from tinyllm.kernels.cuda.linear import (
    column_sums,
    gelu_backward_times,
    gelu_linear,
    linear_forward,
    times,
    weight_gradient,
)
from tinyllm.kernels.known import known_layers, linears_and_norms
from tinyllm.nn.layers import LayerNorm
from tinyllm.nn.mlp import MLP, GatedMLP
from tinyllm.nn.transformer import Block
from tinyllm.tensor import op

LINEAR = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.gate", "mlp.up", "mlp.down")
NAMES = tuple(f"{layer}.{kind}" for layer in ("attention_norm", "mlp_norm", *LINEAR) for kind in ("weight", "bias"))
NUMBER = {name: i for i, name in enumerate(("x", *NAMES))}
ACTIVATIONS = {MLP: ops.gelu_tanh, GatedMLP: ops.swiglu}
ALIGNED = 8  # 16-bit numbers in the 16 bytes that kernels and cuBLASLt load at once


@attach_module(Block, device="cuda")
def block(module, x, around, layer):
    """`nn.Block`'s forward."""
    if not _fits(module, around, x):
        return NotImplemented
    if "documents" not in around.notes:  # in the first layer
        around.notes["documents"] = None if around.documents is None else attention.edges(array_module(x.data), around.documents)
    documents = around.notes["documents"]
    if documents is None and around.documents is not None:
        return NotImplemented
    a, mlp, norm = module.attention, module.mlp, module.attention_norm
    layers = (norm, module.mlp_norm, a.query, a.key, a.value, a.output, getattr(mlp, "gate", None), mlp.up, mlp.down)  # as in NAMES
    parameters = [getattr(layer, kind, None) for layer in layers for kind in ("weight", "bias")]
    half = {name: halves.of(p, x.dtype) for name, p in zip(NAMES, parameters, strict=True) if p is not None and "norm" not in name}
    return fused_block(
        x, *parameters, half=half, head_width=a.head_width, centre=type(norm) is LayerNorm, eps=norm.eps, rotation=around.rotation,
        window=a.settings["window"], documents=documents,
    )  # fmt: skip


def _fits(module, around, x) -> bool:
    if not is_half(x) or x.ndim != 3 or module.order is not Block._pre or not known_layers(module):
        return False
    a, (linears, (first, second)) = module.attention, linears_and_norms(module)
    return (
        not any(n % ALIGNED for linear in linears for n in linear.weight.shape)
        and len({linear.bias is None for linear in (a.query, a.key, a.value)}) == 1
        and not (module.dropout and around.rng is not None)
        and around.cache is None
        and around.causal
        and a.slopes is None
        and a.query_norm is None
        and a.settings["softcap"] is None
        and a.head_width in attention.TILES
        and module.mlp.activation is ACTIVATIONS[type(module.mlp)]
        and (type(first), first.eps) == (type(second), second.eps)
    )


@op
def fused_block(*arrays, half, head_width, centre, eps, rotation, window, documents):
    """y = x' + mlp(norm(x')) with x' = x + attention(norm(x)).     x (B, T, C), the parameters in the order of NAMES -> (B, T, C)

    half : the linear maps' parameters by name, in x's format.     documents : as `attention.edges` gave them, or None
    """
    shape, p = arrays[0].shape, dict(zip(NAMES, arrays[1:], strict=True))
    x = array_module(arrays[0]).ascontiguousarray(arrays[0]).reshape(-1, shape[2])
    settings = dict(causal=True, window=window, scale=head_width**-0.5, documents=documents)
    h, first = _norm(p, "attention_norm", x, centre, eps)
    qkv = linear_forward(h, _side_by_side(half, "weight"), _side_by_side(half, "bias"))
    q, k, v = _heads(qkv, shape, head_width, half)
    _turn(q, k, rotation, 1)
    o, lse = attention.forward(q, k, v, **settings)
    attended = linear_forward(_merged(o), half["attention.output.weight"], half.get("attention.output.bias"), out=h)
    h, second, middle = _norm(p, "mlp_norm", x, centre, eps, plus=attended)
    active, inner = _mlp(half, h)
    y = linear_forward(active, half["mlp.down.weight"], half.get("mlp.down.bias"), out=h)
    y += middle
    del active, attended, h

    def backward(dy):
        dy = array_module(dy).ascontiguousarray(dy).reshape(x.shape)
        d_middle = yield from _mlp_backward(p, half, dy, middle, second, inner, centre, eps)
        dx = yield from _attention_backward(p, half, d_middle, x, first, (q, k, v, o, lse), rotation, centre, eps, settings)
        yield NUMBER["x"], dx.reshape(shape)

    return y.reshape(shape), backward


def _mlp(half, h):
    """The activation's result, and what it was made of.     (N, C) -> (N, F), one or two (N, F)"""
    if "mlp.gate.weight" not in half:
        active, inner = gelu_linear(h, half["mlp.up.weight"], half.get("mlp.up.bias"))
        return active, (inner,)
    inner = tuple(linear_forward(h, half[f"mlp.{name}.weight"], half.get(f"mlp.{name}.bias")) for name in ("gate", "up"))
    return activations.swiglu_forward(*inner), inner


def _mlp_backward(p, half, dy, middle, statistics, inner, centre, eps):
    """Yield the gradients of the MLP's parameters; return that of its input x', the residual stream's dy included."""
    if len(inner) == 1:
        d_inner = [gelu_backward_times(dy, half["mlp.down.weight"], inner[0])]
        active = activations.gelu_forward(inner[0])
    else:
        *d_inner, active = activations.swiglu_backward(*inner, times(dy, half["mlp.down.weight"]))
    yield from _weights("mlp.down", dy, active)
    del active
    names = ("mlp.up",) if len(inner) == 1 else ("mlp.gate", "mlp.up")
    dh = times(d_inner[0], half[f"{names[0]}.weight"])
    for name, d in zip(names[1:], d_inner[1:], strict=True):
        times(d, half[f"{name}.weight"], out=dh, beta=1.0)
    h, _ = _norm(p, "mlp_norm", middle, centre, eps)
    for name, d in zip(names, d_inner, strict=True):
        yield from _weights(name, d, h)
    del d_inner, h
    return (yield from _norm_backward(p, "mlp_norm", dh, middle, statistics, centre, plus=dy))


def _attention_backward(p, half, dy, x, statistics, kept, rotation, centre, eps, settings):
    """The same for attention."""
    q, k, v, o, lse = kept
    yield from _weights("attention.output", dy, _merged(o))
    do = times(dy, half["attention.output.weight"]).reshape(o.swapaxes(1, 2).shape).swapaxes(1, 2)
    joined = array_module(x).empty((len(x), sum(part.shape[1] for part in (q, k, v)) * q.shape[3]), dtype=x.dtype)
    dq, dk, dv = _heads(joined, (q.shape[0], q.shape[2], x.shape[1]), q.shape[3], half)
    attention.backward(q, k, v, o, lse, do, deterministic=deterministic(), out=(dq, dk, dv), **settings)
    del do
    _turn(dq, dk, rotation, -1)
    dh = times(joined, _side_by_side(half, "weight"))
    h, _ = _norm(p, "attention_norm", x, centre, eps)
    start = 0
    for name in LINEAR[:3]:
        part = joined[:, start : start + len(half[f"{name}.weight"])]
        yield from _weights(name, part, h)
        start += part.shape[1]
    del joined, dq, dk, dv, part, h
    return (yield from _norm_backward(p, "attention_norm", dh, x, statistics, centre, plus=dy))


def _norm(p, name, x, centre, eps, plus=None):
    return norms.forward(x, p[f"{name}.weight"], p[f"{name}.bias"], eps, centre, plus)


def _norm_backward(p, name, dh, x, statistics, centre, plus):
    dx, dw, db = norms.backward(dh, x, statistics, p[f"{name}.weight"], centre, plus)
    yield NUMBER[f"{name}.weight"], dw
    yield NUMBER[f"{name}.bias"], db
    return dx


def _weights(name, dy, x):
    yield NUMBER[f"{name}.weight"], weight_gradient(dy, x)
    yield NUMBER[f"{name}.bias"], lambda: column_sums(dy)


def _heads(joined, shape, head_width, half):
    """Views of (N, C + 2·G·D) as q, k and v.     -> (B, H, T, D), (B, G, T, D) twice"""
    parts, start = [], 0
    for name in LINEAR[:3]:
        width = len(half[f"{name}.weight"])
        parts.append(joined[:, start : start + width].reshape(*shape[:2], -1, head_width).swapaxes(1, 2))
        start += width
    return parts


def _merged(o):
    """(B, H, T, D), lying as (B, T, H, D) -> (N, H·D)"""
    return o.swapaxes(1, 2).reshape(-1, o.shape[1] * o.shape[3])


def _turn(q, k, rotation, direction):
    """RoPE in place; back again with direction -1."""
    if rotation is not None:
        for x in (q, k):
            rope.turn(x, *rotation, direction=direction, out=x)


def _side_by_side(half, kind):
    """The three projections' weights (or biases) one below the other: a view where they lie so in memory, else a copy; None without."""
    arrays = [half[name] for name in (f"{layer}.{kind}" for layer in LINEAR[:3]) if name in half]
    if not arrays:
        return None
    base = arrays[0].base
    flat = base is not None and base.ndim == 1 and base.dtype == arrays[0].dtype
    if flat and all(x.base is base and x.flags.c_contiguous for x in arrays):
        places = [x.data.ptr for x in arrays]
        if all(place + x.nbytes == following for place, x, following in zip(places, arrays, places[1:], strict=False)):
            start = (places[0] - base.data.ptr) // base.itemsize
            return base[start : start + sum(x.size for x in arrays)].reshape(-1, *arrays[0].shape[1:])
    return array_module(arrays[0]).concatenate(arrays)
