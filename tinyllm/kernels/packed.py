"""Documents that share a row: where each begins and ends, which is all that a kernel of attention needs to know of them."""
import numpy as np


def edges(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The first position of each token's document, and one past its last.     (B, T) int -> (B, T), (B, T) int

    None where some row has a document in pieces: what its tokens see is then no one stretch of the row.
    """
    change = documents[:, 1:] != documents[:, :-1]
    if np.count_nonzero(change) > np.count_nonzero(np.diff(np.sort(documents))):  # more changes than numbers: one of them came again
        return None
    T, edge = documents.shape[1], np.ones((len(documents), 1), bool)
    at = np.arange(T)
    begin = np.maximum.accumulate(np.where(np.hstack([edge, change]), at, 0), 1)
    end = np.minimum.accumulate(np.where(np.hstack([change, edge]), at + 1, T)[:, ::-1], 1)[:, ::-1]
    return begin, end
