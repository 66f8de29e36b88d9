"""How alike are two texts? Shingles, their Jaccard similarity, and MinHash, which estimates it from a few numbers a text.

The shingles of a text are the set of all its n neighbouring characters, taken after what does not matter (case, white space) is made
equal. Two texts are as alike as their sets A and B are:

    J(A, B) = |A ∩ B| / |A ∪ B|

Order all possible shingles at random by a permutation π. The first shingle of A ∪ B is equally likely to be any of them, and it is the
first of both A and B exactly when it lies in A ∩ B. So

    P[ min π(A) = min π(B) ] = J(A, B)

and k permutations give a signature of k minima, whatever the length of the text. Cut into b bands of r rows (k = b·r), two signatures
agree in all r rows of a band with probability J^r, and in some band at all, which makes their texts candidates, with probability

    1 - (1 - J^r)^b            an S-curve, steepest near J = (1/b)^(1/r): `catch_rate`

Documents that agree in a band are found by sorting, without comparing each with each.
Sources: Broder 1997; Indyk & Motwani 1998; Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, chapter 3.
"""
import random
import unicodedata
from collections.abc import Sequence

import numpy as np

from tinyllm.backend import random_stream
from tinyllm.threads import parallel

BASE = np.uint64(0x9E3779B97F4A7C15)  # any odd number with bits everywhere: 2⁶⁴/golden ratio
PADDING = "\0"  # a text shorter than a shingle is filled up to one


def normalised(text: str) -> str:
    """What has to be equal for two texts to count as the same: NFC, without case, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def shingle_set(text: str, n: int) -> set[str]:
    """The definition: all n neighbouring characters of a text that is normalised; a shorter text is one shingle."""
    return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}


def jaccard_naive(a: str, b: str, n: int) -> float:
    """J of two normalised texts, by definition. `jaccard` of their `shingle_hashes` is the same number."""
    a, b = shingle_set(a, n), shingle_set(b, n)
    return len(a & b) / len(a | b)


def signature_naive(text: str, n: int, k: int, seed: int) -> list[int]:
    """k minima over k random orders of the shingles, by definition: each order is a random number drawn for each shingle."""
    return [min(random.Random(f"{seed} {i} {shingle}").getrandbits(32) for shingle in shingle_set(text, n)) for i in range(k)]


def catch_rate(similarity: float, bands: int, rows: int) -> float:
    """The probability that two texts of this Jaccard similarity agree in at least one of the bands."""
    return 1 - (1 - similarity**rows) ** bands


# ---- all documents of a batch at once ----


def shingle_hashes(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit number for each shingle of each text.     D texts -> hashes (S,) uint64, starts (D,) int64

    Text i owns hashes[starts[i] : starts[i + 1]]. A shingle's number is the polynomial Σ_j c_j·BASE^(n-1-j) mod 2⁶⁴ in its characters,
    by Horner's rule for all places at once, then mixed so that every bit depends on every character. Two different shingles
    share a number with probability 2⁻⁶⁴, so that sets of numbers are as good as sets of shingles.
    """
    padded = [text.ljust(n, PADDING) for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.array([len(text) for text in padded])
    ends = np.cumsum(lengths)
    hashes = np.zeros(len(codes) - n + 1, np.uint64)
    for j in range(n):
        hashes *= BASE
        hashes += codes[j : j + len(hashes)]
    inside = np.ones(len(codes), bool)
    inside[ends[:, None] - np.arange(1, n)] = False  # the last n - 1 places of a text would read on into the next one
    starts = np.cumsum(lengths - (n - 1)) - (lengths - (n - 1))
    return mixed(hashes[inside[: len(hashes)]]), starts


def mixed(x: np.ndarray) -> np.ndarray:
    """Spread each number's bits over all 64 places, one to one (the finalizer of SplitMix64, Steele et al. 2014). Works in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """J of two sets, each an array of different numbers."""
    both = np.concatenate([a, b])
    both.sort()
    common = np.count_nonzero(both[1:] == both[:-1])
    return common / (len(both) - common)


def permutations(k: int, seed: int) -> np.ndarray:
    """k random permutations of the 32-bit numbers, x -> a·x + b mod 2³² with a odd.     (2, k) uint32: a and b

    Only 2⁶³ of the (2³²)! orders are of this kind. They do because x is mixed well already; the test of the catch rate would tell.
    """
    a, b = random_stream(seed, "minhash").integers(0, 2**32, (2, k), np.uint32)
    return np.stack([a | np.uint32(1), b])


def minima(x: np.ndarray, starts: np.ndarray, ab: np.ndarray) -> np.ndarray:
    """The smallest a·x + b mod 2³² of each document under each permutation.     (S,) uint32, (D,), (2, k) -> (D, k) uint32

    One permutation at a time over an array that stays in the cache; permutations are shared out over the threads.
    """
    found = np.empty((ab.shape[1], len(starts)), np.uint32)

    def work(part: slice, _: int) -> None:
        y = np.empty_like(x)
        for i in range(part.start, part.stop):
            np.multiply(x, ab[0, i], out=y)
            y += ab[1, i]
            np.minimum.reduceat(y, starts, out=found[i])

    parallel(work, len(found))
    return found.T


def signatures(texts: Sequence[str], n: int, ab: np.ndarray) -> np.ndarray:
    """MinHash signatures of normalised texts.     D texts -> (D, k) uint32"""
    hashes, starts = shingle_hashes(texts, n)
    return minima((hashes >> np.uint64(32)).astype(np.uint32), starts, ab)


def band_keys(signature: np.ndarray, bands: int) -> np.ndarray:
    """One 64-bit number for the r rows of each band.     (D, b·r) uint32 -> (D, b) uint64

    Other rows give the same number with probability 2⁻⁶⁴; candidates are verified anyway.
    """
    rows = signature.reshape(len(signature), bands, -1)
    keys = np.zeros(rows.shape[:2], np.uint64)
    for row in range(rows.shape[2]):
        keys *= BASE
        keys += rows[:, :, row]
    return mixed(keys)
