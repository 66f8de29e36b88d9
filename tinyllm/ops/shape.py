"""Moving numbers without changing them. Each backward moves dy back along the same way.

Where the forward drops elements (getitem), the backward leaves zeros; where it copies them (expand, repeated indices), it adds up.
"""
import itertools

from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def reshape(x, *, shape):
    """The same elements in the same order, in another shape; one length may be -1."""
    before = x.shape  # the closure keeps the shape, not x, which can then be freed
    return x.reshape(shape), lambda dy: dy.reshape(before)


@op
def transpose(x, *, axes=None):
    """y's axis i is x's axis axes[i] (None reverses them).   dx = dy with the inverse permutation."""
    axes = tuple(reversed(range(x.ndim))) if axes is None else tuple(a % x.ndim for a in axes)
    inverse = sorted(range(x.ndim), key=axes.__getitem__)
    return x.transpose(axes), lambda dy: dy.transpose(inverse)


@op
def swapaxes(x, *, first, second):
    """Two axes change places; swapping them again undoes it."""
    return x.swapaxes(first, second), lambda dy: dy.swapaxes(first, second)


@op
def expand(x, *, shape):
    """x copied along broadcast axes to the given shape.   dx: the copies' gradients added up, which the engine does for every op."""
    return array_module(x).broadcast_to(x, shape), lambda dy: dy


@op
def concatenate(*xs, axis=0):
    """The xs one after the other along an axis.   Each gets its own part of dy."""
    starts = list(itertools.accumulate((x.shape[axis] for x in xs), initial=0))
    y = array_module(xs[0]).concatenate(xs, axis)

    def backward(dy):
        return tuple(dy[_along(axis, dy.ndim, slice(a, b))] for a, b in itertools.pairwise(starts))

    return y, backward


@op
def stack(*xs, axis=0):
    """The xs side by side along a new axis.   Each gets its own part of dy."""
    y, count = array_module(xs[0]).stack(xs, axis), len(xs)
    return y, lambda dy: tuple(dy[_along(axis, dy.ndim, i)] for i in range(count))


def split(x, sections: int, *, axis=-1):
    """x cut into equal parts along an axis: a tuple of Tensors, each a getitem."""
    n = x.shape[axis]
    if n % sections:
        raise ValueError(f"split: an axis of length {n} cannot be cut into {sections} equal parts")
    size = n // sections
    return tuple(getitem(x, index=_along(axis, x.ndim, slice(i * size, (i + 1) * size))) for i in range(sections))


@op
def getitem(x, *, index):
    """y = x[index]: slices, integers, None, boolean and integer arrays.   dx = 0 but for dx[index] += dy, repeated indices adding up."""
    xp, shape = array_module(x), x.shape

    def backward(dy):
        dx = xp.zeros(shape, dtype=dy.dtype)
        if any(hasattr(i, "dtype") or isinstance(i, list) for i in (index if isinstance(index, tuple) else (index,))):
            xp.add.at(dx, index, dy)  # += would keep only one of several writes to the same place
        else:
            dx[index] = dy
        return dx

    return x[index], backward


@op
def gather(x, index, *, axis=-1):
    """y picks along one axis, per position: y[…, j, …] = x[…, index[…, j, …], …].   dx adds dy back at the same places.

    index has x's number of axes, and x's lengths on all but `axis`.
    """
    xp, shape = array_module(x), x.shape
    index = xp.asarray(index)

    def backward(dy):
        dx = xp.zeros(shape, dtype=dy.dtype)
        grid = list(xp.ix_(*(xp.arange(n) for n in index.shape)))
        grid[axis] = index
        xp.add.at(dx, tuple(grid), dy)
        return dx, None

    return xp.take_along_axis(x, index, axis), backward


@op
def pad(x, *, widths, value=0.0):
    """x with `widths[a] = (before, after)` elements of a constant added around it on axis a.   dx = the inner part of dy."""
    inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    return array_module(x).pad(x, widths, constant_values=value), lambda dy: dy[inner]


def _along(axis, ndim, index):
    """An index tuple that applies `index` on one axis and takes all of the others."""
    return (slice(None),) * (axis % ndim) + (index,)
