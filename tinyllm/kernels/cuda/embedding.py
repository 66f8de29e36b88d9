"""The embedding table's gradient on the GPU, added where it belongs and always in the same order; see embedding.cu."""
import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module
from tinyllm.kernels import attach
from tinyllm.kernels.cuda.launch import format_of, launch
from tinyllm.kernels.cuda.vectors import widest
from tinyllm.ops.embedding import check_ids
from tinyllm.tensor import Into

CHUNK = 32  # sorted positions for a block, as in embedding.cu
THREADS = 256  # at most in a block


@attach(ops.embedding, "cuda")
def embedding(w, ids):
    """`ops.embedding`; ids on the host spare the device a sort, and the host a wait."""
    if w.dtype.name != "float32":
        return NotImplemented
    xp, (count, width) = array_module(w), w.shape
    check_ids(ids, count, "embedding")

    def backward(dy):
        return gradient(ids, xp.ascontiguousarray(dy).reshape(-1, width), count), None

    return xp.take(w, xp.asarray(ids), axis=0), backward


def gradient(ids, dy, count) -> Into:
    """Σ of dy's rows by id, for a table of `count` vectors.     (...) int, host or device, (N, C) contiguous -> Into (count, C) fp32"""
    xp = array_module(dy)

    def add(dw):
        if not dy.size:
            return
        order, ordered = _sorted(xp, ids.reshape(-1), count)
        positions, width = dy.shape
        chunks = -(-positions // CHUNK)
        parts, vec = xp.empty((chunks, 2, width), xp.float32), widest(width, dy, dw)
        threads = min(THREADS, -(-width // (32 * vec)) * 32)
        sizes = dict(FORMAT=format_of(dy), VEC=vec)
        grid = (chunks, -(-width // (threads * vec)))
        launch(xp, "embedding", "sum_chunks", grid, threads, dy, order, ordered, dw, parts, positions, width, **sizes)
        launch(xp, "embedding", "join_chunks", (chunks, -(-width // THREADS)), THREADS, ordered, dw, parts, positions, width, **sizes)

    def write(dw):
        dw.fill(0)
        add(dw)

    return Into(write, add)


def _sorted(xp, ids, count):
    """The positions in the order of their ids, and the ids in that order.     (N,) -> (N,) int32, (N,) int32, on the device

    On the host NumPy sorts numbers of 16 bits digit by digit: 32,768 in 0.1 ms, longer ones in 1.7 ms.
    """
    if isinstance(ids, np.ndarray):
        order = ids.astype(np.uint16 if count <= 2**16 else np.int32).argsort(kind="stable")
        both = xp.asarray(np.stack([order, ids[order]]).astype(np.int32))
        return both[0], both[1]
    order = ids.argsort(kind="stable")
    return order.astype(xp.int32), ids[order].astype(xp.int32)
