"""Activations, block by block: all passes over a block happen while it is in the cache, and only x is kept for the backward.

Bytes moved: the plain expressions read and write memory about ten times an element forward and fifteen backward, and keep two or three
arrays; here each input is read once and the result written once. The tanh is computed again in the backward: 0.4 ns an element, about
as much as four passes over it.
"""
import math

import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.kernels.cpu.blocks import over_rows, scratch

C = math.sqrt(2 / math.pi)
CUBIC = 0.044715


@attach(ops.gelu_tanh, at_least=2**14)
def gelu_tanh(x):
    """`ops.gelu_tanh`."""
    shape, rows = x.shape, _rows(x)
    y = np.empty_like(rows)
    gelu_forward(rows, y)

    def backward(dy):
        dx = _rows(dy).copy()
        gelu_backward(rows, dx)
        return dx.reshape(shape)

    return y.reshape(shape), backward


@attach(ops.swiglu, at_least=2**14)
def swiglu(gate, up):
    """`ops.swiglu`; the backward makes both gradients in one go through the rows."""
    shape, g, v = gate.shape, _rows(gate), _rows(up)
    y = np.empty_like(g)
    swiglu_forward(g, v, y)

    def backward(dy):
        dv, dg = _rows(dy).copy(), np.empty_like(g)
        swiglu_backward(g, v, dv, dg)
        return dg.reshape(shape), dv.reshape(shape)

    return y.reshape(shape), backward


def _rows(x):
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def gelu_forward(x, y):
    """y ← x·h with h = (1 + tanh(√(2/π)·(x + 0.044715·x³)))/2.     (N, C)"""

    def work(block, _):
        xb, out = x[block], y[block]
        np.multiply(xb, xb, out=out)
        _half_tanh(xb, out, out)
        out *= xb

    over_rows(work, *x.shape, arrays=2)


def gelu_backward(x, d, y=None):
    """d is dy and becomes dx; y, where given, becomes the activation again.     (N, C)

    With u the tanh's argument and h = (1 + tanh u)/2: h' = 2h(1 - h)·u', so      dx = dy·(h + 2u'·h(1 - h)·x)
    """

    def work(block, _):
        xb, db = x[block], d[block]
        square, h, slope = (scratch(name, xb.shape, xb.dtype) for name in ("square", "h", "slope"))
        np.multiply(xb, xb, out=square)
        _half_tanh(xb, square, h)
        np.multiply(square, 6 * C * CUBIC, out=slope)  # 2·u'
        slope += 2 * C
        np.subtract(1, h, out=square)
        square *= h
        square *= xb  # h(1 - h) comes first: it is 0 for a large x, whose x³ would be infinite
        slope *= square
        slope += h
        db *= slope
        if y is not None:
            np.multiply(xb, h, out=y[block])

    over_rows(work, *x.shape, arrays=6)


def _half_tanh(x, square, h):
    """h ← (1 + tanh(√(2/π)·(x + 0.044715·x³)))/2, from x and x²; h may be the array of squares."""
    np.multiply(square, C * CUBIC, out=h)
    h += C
    h *= x
    np.tanh(h, out=h)
    h *= 0.5
    h += 0.5


def swiglu_forward(gate, up, y):
    """y ← up·gate·s with s = sigmoid(gate).     (N, C)"""

    def work(block, _):
        out = y[block]
        _sigmoid(gate[block], out)
        out *= gate[block]
        out *= up[block]

    over_rows(work, *gate.shape, arrays=3)


def swiglu_backward(gate, up, d, d_gate, y=None):
    """d is dy and becomes the gradient of up; d_gate is written; y, where given, becomes the activation again.     (N, C)

    d gate = dy·up·s·(1 + gate·(1 - s))      d up = dy·gate·s
    """

    def work(block, _):
        g, v, db, out = gate[block], up[block], d[block], d_gate[block]
        s = scratch("s", g.shape, g.dtype)
        _sigmoid(g, s)
        np.subtract(1, s, out=out)
        out *= g
        out += 1
        out *= s
        out *= db
        out *= v
        s *= g
        db *= s
        if y is not None:
            np.multiply(s, v, out=y[block])

    over_rows(work, *gate.shape, arrays=6)


def _sigmoid(x, out):
    """out ← (1 + tanh(x/2))/2"""
    np.multiply(x, 0.5, out=out)
    np.tanh(out, out=out)
    out *= 0.5
    out += 0.5
