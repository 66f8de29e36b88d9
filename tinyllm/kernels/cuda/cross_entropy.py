"""The output head and the loss in one, a slice of rows at a time; and the loss of scores that are there already.

For each slice: z = x·wᵀ in x's format; one kernel turns z into the rows' losses and, in place, into u·(softmax(z) - [t]); then, where a
gradient is being recorded, dx = dz·w and dw += dzᵀ·x at once, in fp32, for an upstream gradient of 1, which the backward only scales: the
scores are computed once, not twice. Beside one slice of scores, that takes dx and dw in fp32 and nothing more.

A row's weight u is relative to the largest one. Its share of the mean, 1/N, is taken out of dz, since 16 bits would lose it: fp16 ends
at 6·10⁻⁸. For the same reason dz is made 4096 times as large in fp16; its largest value is then 4096·(1 + 2ζ·lse), far from 65504.
"""
import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module
from tinyllm.kernels import attach
from tinyllm.kernels.cuda.launch import FORMATS, format_of, launch
from tinyllm.kernels.cuda.linear import times
from tinyllm.ops.cross_entropy import targets_and_shares
from tinyllm.tensor import recording

SCORES = 2**30  # bytes of scores that are there at a time: the products are at their best rate with far fewer rows
LEAST = 1024  # rows of a slice: below, products and launches get slow
TILE = 128  # slices are whole numbers of what one block of a product computes
SMALLEST = 1e-30  # in place of the largest share where every row is ignored, and nothing is divided by it but 0
GAIN = {"FP32": 1.0, "FP16": 4096.0, "BF16": 1.0}


@attach(ops.linear_cross_entropy, "cuda")
def linear_cross_entropy(x, w, targets, weights=None, *, ignore_index=-1, label_smoothing=0.0, z_loss=0.0, rows=None):
    """`ops.linear_cross_entropy`. Scores are rounded to x's format, all else is in fp32."""
    if not (_is_ours(x, w) and x.size):
        return NotImplemented
    xp, gradient = array_module(x), recording()
    flat, w = xp.ascontiguousarray(x.reshape(-1, x.shape[-1])), w.astype(x.dtype, copy=False)
    t, share, top = _weighed(xp, targets, weights, ignore_index, len(flat), len(w))
    step = rows or _rows(len(flat), len(w), x.itemsize)
    losses, scores = xp.empty(len(flat), dtype=xp.float32), _scores(xp, min(step, len(flat)), len(w), x.dtype)
    dx, dw = (xp.empty(shape, dtype=xp.float32) if gradient else None for shape in (flat.shape, w.shape))
    gain = GAIN[format_of(x)]
    for start in range(0, len(flat), step):
        s = slice(start, min(start + step, len(flat)))
        z = scores[: s.stop - s.start]
        times(flat[s], w.T, z)
        in_place(z, t[s], share[s], losses[s], label_smoothing, z_loss, gain if gradient else None)
        if gradient:
            times(z, w, dx[s], alpha=1 / gain)
            times(z.T, flat[s], dw, alpha=1 / gain, beta=float(start > 0))

    def backward(dy):
        factor, shape = dy * top, x.shape
        return lambda: _scaled(dx, factor).reshape(shape), lambda: _scaled(dw, factor), None, None

    return losses.sum() * top, backward


@attach(ops.cross_entropy, "cuda")
def cross_entropy(logits, targets, weights=None, *, ignore_index=-1, label_smoothing=0.0, z_loss=0.0):
    """`ops.cross_entropy`. The scores stay as they are: the backward works on a copy, which becomes their gradient."""
    if not (_is_ours(logits) and logits.size):
        return NotImplemented
    xp = array_module(logits)
    z = xp.ascontiguousarray(logits.reshape(-1, logits.shape[-1]))
    t, share, top = _weighed(xp, targets, weights, ignore_index, *z.shape)
    losses = xp.empty(len(z), dtype=xp.float32)
    in_place(z, t, share, losses, label_smoothing, z_loss, None)

    def backward(dy):
        dz = z.copy()
        in_place(dz, t, share * (dy * top), losses, label_smoothing, z_loss, 1.0)
        return dz.reshape(logits.shape), None, None

    return losses.sum() * top, backward


def in_place(z, targets, weights, losses, label_smoothing: float, z_loss: float, gain: float | None) -> None:
    """The weighted loss of each row, and in the place of its scores gain times its gradient; they stay where gain is None.

    z : (N, V), rows evenly apart.     targets : (N,) int32.     weights, losses : (N,) fp32.
    """
    V, stride = z.shape[1], z.strides[0]
    width = 1 if (stride | z.data.ptr) % 16 else 16 // z.itemsize
    block = min(1024, -(-V // (width * 32)) * 32)
    launch(
        array_module(z), "cross_entropy", "cross_entropy", (len(z),), block, z, targets, weights, losses, V, np.int64(stride // z.itemsize),
        float(label_smoothing), float(z_loss), gain or 1.0, gain is not None, FORMAT=format_of(z), WIDTH=width,
    )  # fmt: skip


def _is_ours(*arrays) -> bool:
    return all(array_module(x) is array_module(arrays[0]) and x.dtype.name in FORMATS for x in arrays)


def _weighed(xp, targets, weights, ignore_index, count, vocabulary):
    """Targets as int32, each row's share of the mean relative to the largest one, and that one, as a 0-d array."""
    t, share = targets_and_shares(targets, weights, ignore_index, xp.empty(count, dtype=xp.float32), vocabulary)
    share = xp.asarray(share, dtype=xp.float32)
    top = share.max()
    return xp.asarray(t, dtype=xp.int32), share / xp.maximum(top, np.float32(SMALLEST)), top


def _rows(count: int, vocabulary: int, itemsize: int) -> int:
    """How many rows a slice has: as few slices as the memory allows, all about equally long."""
    slices = -(-count // max(LEAST, SCORES // (vocabulary * itemsize)))
    return -(-count // (slices * TILE)) * TILE


def _scores(xp, rows: int, vocabulary: int, dtype):
    """Room for scores. Rows begin where the memory's lines of 128 bytes do, which tensor cores and vectors like; their padding is nobody's."""
    padded = -(-vocabulary // 64) * 64
    return xp.empty((rows, padded), dtype=dtype)[:, :vocabulary]


def _scaled(x, factor):
    x *= factor
    return x
