"""The table's gradient, added where it belongs instead of to an array of the table's size that is 0 nearly everywhere."""
import numpy as np

from tinyllm import ops
from tinyllm.kernels import attach
from tinyllm.ops.embedding import sum_by_id
from tinyllm.tensor import Into


@attach(ops.embedding)
def embedding(w, ids):
    """`ops.embedding`."""
    y, _ = ops.embedding.array(w, ids)
    width = w.shape[1]

    def backward(dy):
        rows = dy.reshape(-1, width)

        def add(dw):
            if not ids.size:
                return
            found, sums = sum_by_id(np, ids.reshape(-1), rows)
            dw[found] += sums

        def write(dw):
            dw.fill(0)
            add(dw)

        return Into(write, add), None

    return y, backward
