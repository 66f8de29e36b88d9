"""Products of matrices: where nearly all the arithmetic of a language model is.

For Y = X·W (n×k times k×m), perturb each factor: dY = dX·W + X·dW. The loss changes by Σ dy∘dY, and moving the known factor to the
other side of the inner product transposes it:

    dX = dy·Wᵀ      dW = Xᵀ·dy

Shapes decide it too: of dy (n×m) and W (k×m), only dy·Wᵀ has X's shape n×k.
"""
import string

from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def matmul(a, b):
    """y = a·b over the last two axes, leading axes broadcast.     (..., n, k), (..., k, m) -> (..., n, m)

    A 1-D operand is a row vector on the left and a column vector on the right, and its axis is gone from the result.
    """
    a2 = a[None, :] if a.ndim == 1 else a
    b2 = b[:, None] if b.ndim == 1 else b
    y2 = a2 @ b2
    y = y2[..., 0, :] if a.ndim == 1 else y2
    y = y[..., 0] if b.ndim == 1 else y
    del y2

    def backward(dy):
        dy2 = dy[..., None] if b.ndim == 1 else dy
        dy2 = dy2[..., None, :] if a.ndim == 1 else dy2
        return lambda: _drop(dy2 @ b2.swapaxes(-1, -2), a, -2), lambda: _drop(a2.swapaxes(-1, -2) @ dy2, b, -1)

    return y, backward


def _drop(d2, x, axis):
    """The gradient of a vector that took part as a matrix: without the axis that was added, and summed over broadcast axes."""
    return d2 if x.ndim > 1 else d2.squeeze(axis).reshape(-1, x.shape[0]).sum(0)


@op
def linear(x, w, b=None):
    """y = x·wᵀ + b: every row of x against every row of w.     (..., K), (M, K), (M,) -> (..., M)

    w has one row per output, as PyTorch and most published weights store it.

    Backward.  dx = dy·w      dw = dyᵀ·x      db = Σ_rows dy          (dy and x as matrices of N rows)
    """
    xp = array_module(x)
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ w.T
    if b is not None:
        y = xp.add(y, b, out=y if b.dtype == y.dtype else None)

    def backward(dy):
        dy = dy.reshape(-1, dy.shape[-1])
        return (lambda: (dy @ w).reshape(x.shape)), (lambda: dy.T @ rows), (lambda: dy.sum(0))

    return y.reshape(*x.shape[:-1], w.shape[0]), backward


@op
def einsum(*xs, subscripts):
    """Sum of products over named axes, e.g. subscripts="bij,bjk->bik". Explicit output, no repeated letter in a term, no ellipsis.

    Backward.  y is linear in each x. The gradient of one operand is the same sum with that operand and the output exchanged:
        y = einsum("ij,jk->ik", a, b)      da = einsum("ik,jk->ij", dy, b)
    A letter of that operand which stands nowhere else was summed over alone: dy is spread along it, by a factor of ones.
    """
    xp = array_module(xs[0])
    terms, output = _parse(subscripts, len(xs))
    sizes = {letter: n for term, x in zip(terms, xs, strict=True) for letter, n in zip(term, x.shape, strict=True)}

    def gradient(dy, i):
        others = [(t, x) for j, (t, x) in enumerate(zip(terms, xs, strict=True)) if j != i]
        known = set(output).union(*(t for t, _ in others))
        others += [(letter, xp.ones(sizes[letter], dtype=dy.dtype)) for letter in terms[i] if letter not in known]
        spec = ",".join([output, *(t for t, _ in others)]) + "->" + terms[i]
        return xp.einsum(spec, dy, *(x for _, x in others), optimize=True)

    def backward(dy):
        return tuple((lambda i=i: gradient(dy, i)) for i in range(len(xs)))

    return xp.asarray(xp.einsum(subscripts, *xs, optimize=True)), backward


def _parse(subscripts, count):
    left, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    letters = set(string.ascii_letters)
    if not arrow or len(terms) != count or any(len(set(t)) != len(t) or not set(t) <= letters for t in [*terms, output]):
        raise ValueError(
            f"einsum: {subscripts!r} does not fit {count} operands; write one term of distinct letters for each, and the output, "
            'as in "bij,bjk->bik"'
        )
    return terms, output
