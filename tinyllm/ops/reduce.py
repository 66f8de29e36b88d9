"""Many numbers in, one number out, along an axis (or several, or all of them).

`axis` is an int, a tuple, or None for all axes. With keepdims the reduced axes stay, with length 1. The backward of a reduction
spreads dy back over the axes that it removed: `_spread` puts them back with length 1, and broadcasting does the rest.
"""
import math

from tinyllm.backend import array_module
from tinyllm.tensor import op


def _spread(dy, axis, keepdims, ndim):
    """dy with the reduced axes back at length 1, ready to broadcast over x."""
    if keepdims:
        return dy
    axes = range(ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return array_module(dy).expand_dims(dy, tuple(a % ndim for a in axes)) if ndim else dy


def _length(x, axis):
    """How many elements each result is made of."""
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return math.prod(x.shape[a] for a in axes)


@op
def sum(x, *, axis=None, keepdims=False):
    """y = Σ x.   Each x counts once: dx = dy, spread over the axis."""
    xp, shape = array_module(x), x.shape
    return x.sum(axis, keepdims=keepdims), lambda dy: xp.broadcast_to(_spread(dy, axis, keepdims, len(shape)), shape)


@op
def mean(x, *, axis=None, keepdims=False):
    """y = Σ x / n.   dx = dy/n, spread over the axis."""
    xp, shape, n = array_module(x), x.shape, _length(x, axis)
    return x.mean(axis, keepdims=keepdims), lambda dy: xp.broadcast_to(_spread(dy, axis, keepdims, len(shape)) / n, shape)


@op
def max(x, *, axis=None, keepdims=False):
    """y = max x.   dy goes to the largest; where several are equally large, they share it evenly."""
    top = x.max(axis, keepdims=True)
    y = top if keepdims else x.max(axis)

    def backward(dy):
        share = (x == top).astype(x.dtype)
        share /= share.sum(axis, keepdims=True)
        return share * _spread(dy, axis, keepdims, x.ndim)

    return y, backward


@op
def min(x, *, axis=None, keepdims=False):
    """y = min x.   dy goes to the smallest; where several are equally small, they share it evenly."""
    y, backward = max.array(-x, axis=axis, keepdims=keepdims)
    return -y, backward  # two minus signs, one from each side, cancel


@op
def var(x, *, axis=None, keepdims=False, correction=0):
    """y = Σ (x - mean)² / (n - correction).

    Backward.  dy/dx would have a second part through the mean, but Σ (x - mean) = 0 makes it vanish:
        dx = dy · 2 (x - mean) / (n - correction)
    correction = 1 gives the unbiased estimate of a sample.
    """
    centred = x - x.mean(axis, keepdims=True)
    y = (centred * centred).sum(axis, keepdims=keepdims)
    n = _length(x, axis) - correction
    return y / n, lambda dy: centred * (2 / n) * _spread(dy, axis, keepdims, centred.ndim)


@op
def logsumexp(x, *, axis=-1, keepdims=False):
    """y = ln Σ eˣ.

    Computed as m + ln Σ e^(x-m) with m = max x: the largest exponent is then 0, so nothing overflows.
    Backward.  dx = dy · softmax(x) = dy · e^(x-m)/Σ e^(x-m)
    """
    xp = array_module(x)
    top = x.max(axis, keepdims=True)
    nothing = top == -math.inf  # the sum is 0, so y is -inf and the gradient 0, not NaN
    top = xp.where(xp.isfinite(top), top, 0)
    total = xp.where(nothing, 1, xp.exp(x - top).sum(axis, keepdims=True))

    def backward(dy):
        return xp.exp(x - top) * (_spread(dy, axis, keepdims, x.ndim) / total)

    y = xp.where(nothing, -math.inf, top + xp.log(total))
    return y if keepdims else y.squeeze(axis), backward
