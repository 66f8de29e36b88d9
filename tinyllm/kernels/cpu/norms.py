"""LayerNorm and RMSNorm, block by block. Kept for the backward: x and one or two numbers a row, instead of the normalised rows.

Sums over a row are products with a vector of ones, or of the row with itself: BLAS adds several times faster than a reduction along the
last axis. Where a product with the gain would come before the sum, the gain takes the place of the ones.
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
    y, gradient = _norm(x, w, None, eps, centre=False)
    return y, lambda dy: gradient(dy)[:2]


def _norm(x, w, b, eps, centre):
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y, shape = np.empty_like(rows), x.shape  # the backward must not hold x, of which rows may be a copy
    statistics = forward(rows, w, b, eps, centre, y)

    def gradient(dy):
        dy = np.ascontiguousarray(dy).reshape(rows.shape)
        dx = np.empty_like(rows)
        dw, db = backward(dy, rows, statistics, w, dx)
        return dx.reshape(shape), dw, db

    return y.reshape(shape), gradient


def forward(x, w, b, eps, centre, y):
    """Write y; return (mean, r), each row's mean (None without `centre`) and 1/√(variance + eps).     (N, C), (C,) or None twice"""
    width = x.shape[1]
    ones = np.full(width, 1 / width, x.dtype)
    mean = np.empty((len(x), 1), x.dtype) if centre else None
    r = np.empty((len(x), 1), x.dtype)

    def work(block, _):
        out, centred = y[block], x[block]
        if centre:
            mean[block, 0] = centred @ ones
            centred = np.subtract(centred, mean[block], out=out)
        r[block, 0] = 1 / np.sqrt(np.vecdot(centred, centred) / width + eps)
        np.multiply(centred, r[block], out=out)
        _gain(out, w, b, out)

    over_rows(work, *x.shape, arrays=2)
    return mean, r


def backward(dy, x, statistics, w, dx, b=None, y=None, plus=None):
    """Write dx, plus an array of its shape where one is given; return dw and db.     (N, C) -> (C,), (C,)

    y : where given, the norm's result is written there again (b is needed only for that); it may be the array of dy.
    """
    width, dtype = x.shape[1], x.dtype
    mean, r = statistics
    gain = np.full(width, 1 / width, dtype) if w is None else w / width
    sums = np.zeros((2, threads(), width), dtype)  # each core adds up for itself, so that the order is fixed

    def work(block, number):
        out, g, ones = dx[block], dy[block], np.ones(block.stop - block.start, dtype)
        x_hat = _x_hat(x, statistics, block, scratch("x_hat", out.shape, dtype))
        product = np.multiply(g, x_hat, out=scratch("product", out.shape, dtype))
        sums[0, number] += ones @ product
        sums[1, number] += ones @ g
        along, common = product @ gain, g @ gain if mean is not None else None
        if w is None:
            out[...] = g
        else:
            np.multiply(g, w, out=out)
        if y is not None:
            _gain(x_hat, w, b, y[block])
        x_hat *= along[:, None]  # dx = r·(dy·w - mean(dy·w) - x̂·mean(dy·w·x̂)) + plus
        if mean is not None:
            x_hat += common[:, None]
        out -= x_hat
        out *= r[block]
        if plus is not None:
            out += plus[block]

    over_rows(work, *x.shape, arrays=5)
    return sums.sum(1)


def _x_hat(x, statistics, block, out):
    mean, r = statistics
    centred = x[block] if mean is None else np.subtract(x[block], mean[block], out=out)
    return np.multiply(centred, r[block], out=out)


def _gain(x_hat, w, b, y):
    """y ← x̂·w + b"""
    if w is not None:
        np.multiply(x_hat, w, out=y)
    elif y is not x_hat:
        y[...] = x_hat
    if b is not None:
        y += b
