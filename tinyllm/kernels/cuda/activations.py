"""Activations on the GPU: one pass over memory, only the inputs kept for the backward; see activations.cu."""
from functools import partial

import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module
from tinyllm.kernels import attach
from tinyllm.kernels.cuda.launch import FORMATS, format_of, launch
from tinyllm.kernels.cuda.vectors import widest

THREADS = 256  # in a block


def plain_forward(kind, x):
    """y = f(x).     (...) contiguous -> (...)          kind : a value of activations.cu's ACTIVATION"""
    y = array_module(x).empty_like(x)
    _run("plain_forward", kind, x, y)
    return y


def plain_backward(kind, x, dy):
    """dx = dy·f'(x).     (...), (...) contiguous -> (...)"""
    dx = array_module(x).empty_like(x)
    _run("plain_backward", kind, x, dy, dx)
    return dx


def gated_forward(kind, gate, up):
    """y = f(gate)·up.     (...), (...) contiguous -> (...)"""
    y = array_module(gate).empty_like(gate)
    _run("gated_forward", kind, gate, up, y)
    return y


def gated_backward(kind, gate, up, dy, again=True):
    """d_gate = dy·up·f'(gate), d_up = dy·f(gate), and y, made again, or None.     (...) contiguous, thrice -> (...) thrice"""
    xp = array_module(gate)
    d_gate, d_up, y = xp.empty_like(gate), xp.empty_like(gate), xp.empty_like(gate) if again else None
    _run("gated_backward", kind, gate, up, dy, d_gate, d_up, y)
    return d_gate, d_up, y


gelu_forward, gelu_backward = partial(plain_forward, "GELU_TANH"), partial(plain_backward, "GELU_TANH")
swiglu_forward, swiglu_backward = partial(gated_forward, "SILU"), partial(gated_backward, "SILU")


def _run(name, kind, *arrays):
    x = arrays[0]
    if not x.size:
        return
    xp, vec = array_module(x), widest(0, *arrays)
    blocks = -(-x.size // (THREADS * vec))
    launch(xp, "activations", name, (blocks,), THREADS, *arrays, np.int64(x.size), ACTIVATION=kind, FORMAT=format_of(x), VEC=vec)


def _flat(x):
    return array_module(x).ascontiguousarray(x).reshape(-1)


def _attach_plain(op, kind):
    @attach(op, "cuda")
    def kernel(x):
        if x.dtype.name not in FORMATS:
            return NotImplemented
        shape, x = x.shape, _flat(x)
        return plain_forward(kind, x).reshape(shape), lambda dy: plain_backward(kind, x, _flat(dy)).reshape(shape)


def _attach_gated(op, kind):
    @attach(op, "cuda")
    def kernel(gate, up):
        if gate.dtype.name not in FORMATS or (gate.dtype, gate.shape) != (up.dtype, up.shape):
            return NotImplemented
        shape, gate, up = gate.shape, _flat(gate), _flat(up)

        def backward(dy):
            d_gate, d_up, _ = gated_backward(kind, gate, up, _flat(dy), again=False)
            return d_gate.reshape(shape), d_up.reshape(shape)

        return gated_forward(kind, gate, up).reshape(shape), backward


for _op, _kind in ((ops.gelu_tanh, "GELU_TANH"), (ops.gelu, "GELU"), (ops.silu, "SILU"), (ops.relu, "RELU"), (ops.relu2, "RELU2")):
    _attach_plain(_op, _kind)
for _op, _kind in ((ops.swiglu, "SILU"), (ops.geglu, "GELU")):
    _attach_gated(_op, _kind)
