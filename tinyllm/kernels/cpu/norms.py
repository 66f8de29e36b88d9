"""LayerNorm and RMSNorm, block by block. Kept for the backward: x and one or two numbers a row, instead of the normalised rows.

Sums over a row are products with a vector of ones: BLAS adds several times faster than a reduction along the last axis.
"""
import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.kernels.cpu.blocks import over_rows, scratch
from tinyllm.threads import threads


@attach(ops.layernorm, at_least=2**14)
def layernorm(x, w=None, b=None, *, eps=1e-5):
    """`ops.layernorm`."""
    return _norm(x, w, b, eps, centre=True)


@attach(ops.rmsnorm, at_least=2**14)
def rmsnorm(x, w=None, *, eps=1e-6):
    """`ops.rmsnorm`."""
    y, backward = _norm(x, w, None, eps, centre=False)
    return y, lambda dy: backward(dy)[:2]


def _norm(x, w, b, eps, centre):
    width = x.shape[-1]
    flat = np.ascontiguousarray(x).reshape(-1, width)
    shape, dtype, ones = x.shape, x.dtype, np.full(width, 1 / width, x.dtype)  # the backward must not hold x, of which flat may be a copy
    mean = np.zeros((len(flat), 1), dtype)
    r = np.empty((len(flat), 1), dtype)
    y = np.empty_like(flat)

    def forward_block(block, _):
        out = y[block]
        if centre:
            mean[block, 0] = flat[block] @ ones
            np.subtract(flat[block], mean[block], out=out)
        else:
            out[...] = flat[block]
        square = scratch("square", out.shape, dtype)
        np.multiply(out, out, out=square)
        r[block, 0] = 1 / np.sqrt(square @ ones + eps)
        out *= r[block]
        if w is not None:
            out *= w
        if b is not None:
            out += b

    over_rows(forward_block, *flat.shape, arrays=3)

    def backward(dy):
        dy = np.ascontiguousarray(dy).reshape(flat.shape)
        dx = np.empty_like(flat)
        dw, db = np.zeros((2, threads(), width), dtype)  # each core adds up for itself, so that the order is fixed

        def backward_block(block, number):
            x_hat, out = scratch("x_hat", dy[block].shape, dtype), dx[block]
            np.subtract(flat[block], mean[block], out=x_hat)
            x_hat *= r[block]
            np.multiply(dy[block], x_hat, out=out)
            if w is not None:
                dw[number] += out.sum(0)
                np.multiply(dy[block], w, out=out)
            else:
                out[...] = dy[block]
            if b is not None:
                db[number] += dy[block].sum(0)
            along = scratch("along", out.shape, dtype)
            np.multiply(out, x_hat, out=along)
            x_hat *= (along @ ones)[:, None]
            if centre:
                out -= (out @ ones)[:, None]
            out -= x_hat
            out *= r[block]

        over_rows(backward_block, *flat.shape, arrays=5)
        return dx.reshape(shape), dw.sum(0), db.sum(0)

    return y.reshape(shape), backward
