"""From a token's number to its vector: a row of a table."""
from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def embedding(w, ids):
    """y = w[ids].     (V, C), (...) int -> (..., C)

    The same as a one-hot matrix times w, without the matrix.
    Backward.  dw[id] = Σ dy over all positions that hold this id. Sorting the ids puts the rows to be added side by side, so that
    each id's sum is one `reduceat` segment, always added in the same order.
    """
    xp = array_module(w)

    def backward(dy):
        dw = xp.zeros_like(w)
        flat, rows = ids.reshape(-1), dy.reshape(-1, w.shape[-1])
        if flat.size:
            order = flat.argsort(kind="stable")
            ordered = flat[order]
            starts = xp.flatnonzero(xp.concatenate([xp.ones(1, bool), ordered[1:] != ordered[:-1]]))
            dw[ordered[starts]] = xp.add.reduceat(rows[order], starts, axis=0)
        return dw, None

    return w[ids], backward
