"""Activations, block by block: all passes over a block happen while it is in the cache, and only x is kept for the backward.

Bytes moved: the plain expressions read and write memory about ten times an element forward and fifteen backward, and keep two or three
arrays; here each input is read once and the result written once.
"""
import math

import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.kernels.cpu.blocks import over_rows, scratch

C = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def _tanh_of_cubic(x, t):
    """t ← tanh(√(2/π)·(x + 0.044715·x³))"""
    np.multiply(x, x, out=t)
    t *= C * CUBIC
    t += C
    t *= x
    np.tanh(t, out=t)


@attach(ops.gelu_tanh, at_least=2**14)
def gelu_tanh(x):
    """`ops.gelu_tanh`; the backward computes the tanh again."""
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty_like(flat)

    def forward_block(block, _):
        out = y[block]
        _tanh_of_cubic(flat[block], out)
        out += 1
        out *= flat[block]
        out *= 0.5

    over_rows(forward_block, *flat.shape, arrays=2)
    shape = x.shape

    def backward(dy):
        dy = np.ascontiguousarray(dy).reshape(flat.shape)
        dx = np.empty_like(flat)

        def backward_block(block, _):
            xb, out = flat[block], dx[block]
            t = scratch("t", xb.shape, xb.dtype)
            _tanh_of_cubic(xb, t)
            np.multiply(xb, xb, out=out)  # dx = ½·dy·(1 + t)·(1 + (1 - t)·x·u'), since 1 - t² = (1 + t)(1 - t)
            out *= 3 * C * CUBIC
            out += C
            out *= xb
            u = scratch("u", xb.shape, xb.dtype)
            np.subtract(1, t, out=u)
            out *= u
            out += 1
            t += 1
            t *= 0.5
            out *= t
            out *= dy[block]

        over_rows(backward_block, *flat.shape, arrays=5)
        return dx.reshape(shape)

    return y.reshape(shape), backward


@attach(ops.swiglu, at_least=2**14)
def swiglu(gate, up):
    """`ops.swiglu`; the backward computes the sigmoid again, and both gradients in one go through the rows."""
    shape, width = gate.shape, gate.shape[-1]
    g, v = np.ascontiguousarray(gate).reshape(-1, width), np.ascontiguousarray(up).reshape(-1, width)
    y = np.empty_like(g)

    def forward_block(block, _):
        out = y[block]
        _sigmoid(g[block], out)
        out *= g[block]
        out *= v[block]

    over_rows(forward_block, *g.shape, arrays=3)

    def backward(dy):
        dy = np.ascontiguousarray(dy).reshape(g.shape)
        dg, dv = np.empty_like(g), np.empty_like(g)

        def backward_block(block, _):
            s = scratch("s", dy[block].shape, dy.dtype)
            _sigmoid(g[block], s)
            out = dg[block]
            np.subtract(1, s, out=out)  # d gate = dy·up·s·(1 + gate·(1 - s))
            out *= g[block]
            out += 1
            s *= dy[block]
            out *= s
            out *= v[block]
            np.multiply(s, g[block], out=dv[block])  # d up = dy·gate·s

        over_rows(backward_block, *g.shape, arrays=6)
        return dg.reshape(shape), dv.reshape(shape)

    return y.reshape(shape), backward


def _sigmoid(x, out):
    """out ← (1 + tanh(x/2))/2"""
    np.multiply(x, 0.5, out=out)
    np.tanh(out, out=out)
    out += 1
    out *= 0.5
