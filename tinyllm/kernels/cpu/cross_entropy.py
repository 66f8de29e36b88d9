"""The output head and the loss in one, slice by slice of rows on all cores.

Scores of a slice exist once, in a buffer that is used again for the next slice. Where a gradient is being recorded, the forward makes
it at once, while the scores are there: dx = dz·w and dw = dzᵀ·x for an upstream gradient of 1, which the backward only scales. That
saves computing all scores a second time, a quarter of the head's arithmetic, and costs one array of w's size, which is needed anyway.

Each core takes its part of every slice's rows for scores and dx, then its part of the vocabulary for dw: no sums to add up between
cores, and the same order every time.
"""
import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.kernels.cpu.blocks import scratch
from tinyllm.kernels.cpu.linear import times
from tinyllm.ops.cross_entropy import targets_and_shares
from tinyllm.tensor import recording
from tinyllm.threads import parallel

SCORES = 2**22  # of a slice


@attach(ops.linear_cross_entropy)
def linear_cross_entropy(x, w, targets, weights=None, *, ignore_index=-1, label_smoothing=0.0, z_loss=0.0, rows=None):
    """`ops.linear_cross_entropy`; label smoothing and z-loss go to the op."""
    if label_smoothing or z_loss or not targets.size:
        settings = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, rows=rows)
        return ops.linear_cross_entropy.array(x, w, targets, weights, **settings)
    flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    t, share = targets_and_shares(targets, weights, ignore_index, flat, len(w))
    step = rows or max(1, SCORES // len(w))
    losses = np.empty(len(flat), flat.dtype)
    dx, dw = (np.empty_like(flat), np.zeros_like(w)) if recording() else (None, None)
    for start in range(0, len(flat), step):
        s = slice(start, min(start + step, len(flat)))
        z = scratch("scores", (s.stop - s.start, len(w)), flat.dtype)
        times(flat[s], w.T, out=z)
        _losses(z, t[s], share[s], losses[s], dx is not None)
        if dx is not None:
            times(z, w, out=dx[s])
            _add_times(z.T, flat[s], dw)
    shape = x.shape

    def backward(dy):
        return (lambda: (dx * dy).reshape(shape)), (lambda: dw if dy == 1 else dw * dy), None, None

    counted = share > 0  # an ignored row may have an infinite loss, which its share of 0 would make NaN
    return (losses[counted] * share[counted]).sum(), backward


def _losses(z, t, share, losses, gradient):
    """Each row's loss; with `gradient`, z becomes share·(softmax(z) - [t]), else it is used up.     (n, V), (n,), (n,), (n,)"""

    def work(part, _):
        block, target = z[part], t[part]
        number = np.arange(len(block))
        block -= block.max(-1, keepdims=True)
        own = block[number, target]
        np.exp(block, out=block)
        total = block.sum(-1)
        losses[part] = np.log(total) - own
        if gradient:
            block *= (share[part] / total)[:, None]
            block[number, target] -= share[part]
            block[share[part] == 0] = 0  # whatever an ignored row's scores are

    parallel(work, len(z), at_least=max(1, 2**14 // z.shape[1]))


def _add_times(a, b, out):
    """out += a·b, rows of a shared out over the cores."""

    def work(part, _):
        out[part] += a[part] @ b

    parallel(work, len(a), at_least=max(1, 2**18 // b.size))
