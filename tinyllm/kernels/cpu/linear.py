"""Products of matrices on all cores.

The arithmetic is BLAS's; what is decided here is who computes what. Rows of the result are shared out: y and dx by rows of x, dw by rows
of w. Each core then runs one product of its own, with no waiting for others inside. For few rows (decoding), outputs are shared out
instead: such a product is bound by reading w, and each core reads its own part.
"""
import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.kernels.cpu import few_rows
from tinyllm.tensor import Into
from tinyllm.threads import parallel

ROWS = 32  # a part of a product should have at least this many rows


@attach(ops.linear)
def linear(x, w, b=None):
    """`ops.linear`, shared out over the cores."""
    rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    y = times(rows, w.T)
    if b is not None:
        y += b
    shape = x.shape

    def backward(dy):
        dy = dy.reshape(-1, dy.shape[-1])
        return (lambda: times(dy, w).reshape(shape)), weight_gradient(dy, rows), (lambda: column_sums(dy))

    return y.reshape(*shape[:-1], w.shape[0]), backward


def weight_gradient(dy, x) -> Into:
    """dw = dyᵀ·x, for `linear` of x with w.     (N, M), (N, K) -> (M, K)"""
    return Into(lambda out: times(dy.T, x, out))


def column_sums(dy):
    """Σ over rows.     (N, M) -> (M,)"""
    return np.ones(len(dy), dy.dtype) @ dy


def times(a, b, out=None):
    """a·b for matrices, rows of a (or columns of b, where a has few) shared out over the cores."""
    out = np.empty((a.shape[0], b.shape[1]), a.dtype) if out is None else out
    if a.shape[0] == 1 or a.shape[0] * a.shape[1] * b.shape[1] < 2**24:  # smaller than what sharing out costs, or shared out by BLAS
        few_rows.times(a, b.T, out=out)
    elif a.shape[0] >= 2 * ROWS:
        parallel(lambda part, _: np.matmul(a[part], b, out=out[part]), a.shape[0], ROWS)
    else:
        parallel(lambda part, _: few_rows.times(a, b.T[part], out=out[:, part]), b.shape[1], ROWS)
    return out
