"""From a token's number to its vector: a row of a table."""
from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def embedding(w, ids):
    """y = w[ids].     (V, C), (...) int -> (..., C)

    The same as a one-hot matrix times w, without the matrix. Where w is on a GPU, ids may be there or on the host.
    Backward.  dw[id] = Σ dy over all positions that hold this id. Sorting the ids puts the rows to be added side by side, so that
    each id's sum is one `reduceat` segment, always added in the same order.
    """
    xp = array_module(w)
    check_ids(ids, w.shape[0], "embedding")

    def backward(dy):
        dw = xp.zeros_like(w)
        if ids.size:
            found, sums = sum_by_id(xp, ids.reshape(-1), dy.reshape(-1, w.shape[-1]))
            dw[found] = sums
        return dw, None

    return w[ids], backward


def sum_by_id(xp, ids, rows):
    """The ids that occur, and the sum of each one's rows.     (N,), (N, C) -> (n,), (n, C), N at least 1

    Ids on the host are sorted there. (CuPy's reduceat takes differences of running sums, which costs digits: a GPU's kernel adds up.)
    """
    home = array_module(ids)
    order = ids.argsort(kind="stable")
    ordered = ids[order]
    starts = home.flatnonzero(home.concatenate([home.ones(1, bool), ordered[1:] != ordered[:-1]]))
    return ordered[starts], xp.add.reduceat(rows[order], xp.asarray(starts), axis=0)


def check_ids(ids, count, where) -> None:
    """Raise ValueError for the first id that is not in [0, count). NumPy would take a negative one for a place from the end.

    Ids on a GPU make the host wait for it; those on the host do not.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        flat = ids.reshape(-1)
        bad = flat[(flat < 0) | (flat >= count)]
        raise ValueError(f"{where}: id {int(bad[0])} is outside the vocabulary of {count} ({bad.size} of {flat.size} ids are)")
