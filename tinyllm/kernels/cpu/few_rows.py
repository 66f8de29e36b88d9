"""x·wᵀ for a few rows of x: what decoding does all day.

Such a product is bound by reading w, each number of which takes part in as many multiplications as x has rows. A general product first
copies w into the order in which its inner loop reads it, which pays for hundreds of rows and doubles or triples the traffic for eight.
OpenBLAS has inner loops for small products that read w where it lies, but takes them only up to a size; so w is handed to it as a stack
of blocks of rows that are small enough, in one call of NumPy. Nothing is copied, and nothing can go stale.

Measured on two cores of an AMD EPYC (Zen 4), OpenBLAS 0.3.31, fp32, weights from memory, GB/s of w by both cores:

    x           w              one product    its halves    in blocks    w packed anew, blocks side by side
    1 × 768     50257 × 768    20             27            27           43
    8 × 768     50257 × 768    9              9             20           38
    8 × 768     3072 × 768     9              10            19           28
    8 × 3072    768 × 3072     10             10            23           28
    8 × 128     512 × 128      42 µs                        13 µs        (one core, from the cache)

Weights that are copied in any case (folded.py) come in the order (inputs, outputs), `product`: 10 µs for the last line.

Not taken: packed weights for large models. They would be faster still, for twice the memory and a copy that has to follow every change of the weights.
"""
from functools import lru_cache

import numpy as np

OUTPUTS, WORK = 1024, 10**6  # elements of the result, and multiplications, up to which OpenBLAS reads w in place
MOST = 32  # rows of x; with more, blocks would be too thin to pay


def times(x, w, out=None):
    """x·wᵀ.     (B, K), (M, K) -> (B, M)

    A single row is left to BLAS: such a product reads w in place anyway, and shares it out without Python's threads.
    """
    B, K = x.shape
    block = _block(B, K)
    if not block:
        return np.matmul(x, w.T, out=out)
    count = len(w) // block
    whole = count * block
    out = np.empty((B, len(w)), x.dtype) if out is None else out
    blocks = w[:whole].reshape(count, block, K).swapaxes(1, 2)  # splitting an axis never copies: this and the next are views
    np.matmul(x, blocks, out=out[:, :whole].reshape(B, count, block).swapaxes(0, 1))
    if whole < len(w):
        np.matmul(x, w[whole:].T, out=out[:, whole:])
    return out


def product(x, w, out):
    """out ← x·w, for a w that lies in the order (inputs, outputs), in which such products are a quarter faster.     (B, K), (K, M) -> (B, M)"""
    B, K = x.shape
    if 1 < B <= MOST and B * K * w.shape[1] > WORK:
        times(x, w.T, out=out)
    else:
        np.matmul(x, w, out=out)


@lru_cache
def _block(B, K):
    """How many rows of w to take at a time; 0 for all."""
    return next((rows for rows in (64, 32, 16, 8) if B * rows <= OUTPUTS and B * rows * K <= WORK), 0) if 1 < B <= MOST else 0
