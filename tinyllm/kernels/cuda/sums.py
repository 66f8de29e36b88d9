"""Sums over rows on the GPU, in two stages of a fixed order; see sums.cu."""
import numpy as np

from tinyllm.backend import array_module
from tinyllm.kernels.cuda.launch import format_of, launch
from tinyllm.kernels.cuda.vectors import widest

PARTS = 128  # of the rows: with a few hundred columns a block, enough blocks to keep a large GPU's memory busy


def column_sums(x):
    """Σ over rows, in fp32.     (N, C), rows at any distance -> (C,)"""
    xp, (rows, columns) = array_module(x), x.shape
    if not x.size:
        return xp.zeros(columns, xp.float32)
    if columns > 1 and x.strides[1] != x.itemsize:
        x = xp.ascontiguousarray(x)
    share = -(-rows // PARTS)
    parts = xp.empty((-(-rows // share), columns), xp.float32)
    vec, pitch = widest(columns, x), np.int64(x.strides[0] // x.itemsize)
    grid = (-(-columns // (32 * vec)), len(parts))
    launch(xp, "sums", "column_parts", grid, 256, x, parts, rows, columns, pitch, share, FORMAT=format_of(x), VEC=vec)
    return add_parts(parts)


def add_parts(parts):
    """Σ over the first axis.     (P, ...) fp32 -> (...)"""
    xp = array_module(parts)
    y = xp.empty(parts.shape[1:], xp.float32)
    launch(xp, "sums", "add_parts", (-(-y.size // 32),), 512, parts, y, len(parts), y.size)
    return y
