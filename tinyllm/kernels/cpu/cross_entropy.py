"""The output head and the loss in one, slice by slice of rows on all cores.

Where a gradient is being recorded, the forward makes it at once, while a slice's scores are there: dx = dz·w and dw = dzᵀ·x for an
upstream gradient of 1, which the backward only scales. That saves computing all scores a second time, a quarter of the head's
arithmetic where it is wanted, and is in vain where x and w are frozen. The products of the last slice wait for the backward, dw goes
straight to where it belongs, and a slice has as many rows as w has columns: so the scores that are kept are never more than w, and mostly
there is just this one slice. (With slices of 83 rows, adding up dw for 50,304 tokens moved 3 GB a step.)
"""
import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.kernels.cpu.linear import times
from tinyllm.ops.cross_entropy import targets_and_shares
from tinyllm.tensor import Into, recording
from tinyllm.threads import parallel

SCORES = 2**22  # of a slice of a small vocabulary


@attach(ops.linear_cross_entropy)
def linear_cross_entropy(x, w, targets, weights=None, *, ignore_index=-1, label_smoothing=0.0, z_loss=0.0, rows=None):
    """`ops.linear_cross_entropy`; label smoothing and z-loss go to the op."""
    if label_smoothing or z_loss or not targets.size:
        settings = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, rows=rows)
        return ops.linear_cross_entropy.array(x, w, targets, weights, **settings)
    flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    t, share = targets_and_shares(targets, weights, ignore_index, flat, len(w))
    gradient = recording()
    step = rows or max(w.shape[1] if gradient else 1, SCORES // len(w))
    losses, scores = np.empty(len(flat), flat.dtype), np.empty((min(step, len(flat)), len(w)), flat.dtype)
    dx, dw = (np.empty_like(flat) if gradient else None), None
    for start in range(0, len(flat), step):
        s = slice(start, min(start + step, len(flat)))
        z = scores[: s.stop - s.start]
        times(flat[s], w.T, out=z)
        _losses(z, t[s], share[s], losses[s], gradient)
        if gradient and s.stop < len(flat):
            times(z, w, out=dx[s])
            dw = times(z.T, flat[s]) if dw is None else _add_times(z.T, flat[s], dw)
    shape = x.shape

    def backward(dy):
        def write(out):
            times(z.T, flat[s], out)
            if dw is not None:
                out += dw
            if dy != 1:
                out *= dy

        times(z, w, out=dx[s])
        if dy != 1:
            np.multiply(dx, dy, out=dx)
        return dx.reshape(shape), Into(write), None, None

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
    return out
