"""Find documents that say nearly the same, without comparing each with each: shingles, MinHash, bands.

Text from the web repeats itself, and a model that reads a page a thousand times learns it by heart. You will see

    1. two texts as sets of shingles, and how alike they are
    2. a signature: the first shingles under random orders agree as often as the sets do
    3. bands turn that into a switch: measured on pairs of planted similarity, beside 1-(1-s^r)^b
    4. the same as the library does it: what comparing each with each finds, with far fewer comparisons

    python examples/13_deduplicate.py [--documents 400]
"""
import argparse
import random
import time

import numpy as np

from tinyllm.data import DedupConfig, deduplicate
from tinyllm.data.dedup import deduplicate_naive
from tinyllm.data.minhash import (
    band_keys,
    catch_rate,
    jaccard_naive,
    minima,
    normalised,
    permutations,
    shingle_set,
    signature_naive,
    signatures,
)

A = "The lighthouse keeper lit the lamp at dusk and counted the ships that passed."
B = "The lighthouse keeper lit the lamp at night and counted the boats that passed."
C = "Nobody had told the baker that flour would be so dear by the end of the week."
WORDS = (A + B + C).replace(".", " ").lower().split()


def agreement(a, b, n, k):
    """The share of k minima in which two texts agree: by definition, and by the library's permutations."""
    one, two = (signature_naive(text, n, k, seed=1) for text in (a, b))
    fast = signatures([a, b], n, permutations(k, seed=1))
    return sum(x == y for x, y in zip(one, two, strict=True)) / k, (fast[0] == fast[1]).mean()


def planted(similarity, pairs, rng, size=200):
    """Pairs of sets whose union has `size` members, and whose Jaccard similarity is what is asked for.

    Returns all members, one set after the other, and where each set begins.
    """
    common = round(size * similarity / 2) * 2
    shared = rng.integers(0, 2**32, (pairs, 1, common), np.uint32).repeat(2, axis=1)
    own = rng.integers(0, 2**32, (pairs, 2, (size - common) // 2), np.uint32)
    sets = np.concatenate([shared, own], axis=2)
    return sets.ravel(), np.arange(2 * pairs) * sets.shape[2]


def measured_rate(similarity, bands, rows, pairs=500):
    """How many of the pairs agree in all rows of at least one band."""
    rng = np.random.default_rng(round(1000 * similarity))
    keys = band_keys(minima(*planted(similarity, pairs, rng), permutations(bands * rows, seed=0)), bands)
    return (keys[::2] == keys[1::2]).any(1).mean()


def corpus(count, rng):
    """Texts of fifty words, a fifth of them earlier ones with a few words changed."""
    texts = []
    for _ in range(count):
        if texts and rng.random() < 0.2:
            words = rng.choice(texts).split()
            for _ in range(rng.randint(0, 3)):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        else:
            words = rng.choices(WORDS, k=50)
        texts.append(" ".join(words))
    return texts


def timed(function, *arguments):
    """A function's result, and the seconds it took."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


def main(documents=400):
    n = 5
    a, b, c = map(normalised, (A, B, C))
    print(f"1. Shingles of {n} characters: {a[:20]!r} begins {sorted(a[i : i + n] for i in range(4))}")
    both, either = shingle_set(a, n) & shingle_set(b, n), shingle_set(a, n) | shingle_set(b, n)
    print(f"   {A!r}\n   {B!r}")
    print(f"   share {len(both)} of {len(either)}: similarity {jaccard_naive(a, b, n):.3f}")
    print(f"   {C!r}\n   and the first: {jaccard_naive(a, c, n):.3f}\n")

    print("2. Put all shingles into a random order: the first of A and the first of B are the same one as often as the sets are alike.")
    for k in (10, 100, 1000):
        naive, fast = agreement(a, b, n, k)
        print(f"   {k:5} orders: {naive:.3f} of them by definition, {fast:.3f} by x -> a·x + b mod 2³²     error about {1 / (2 * k**0.5):.3f}")
    print()

    bands, rows = 16, 8
    print(f"3. {bands} bands of {rows} rows: a pair is compared if it agrees in a whole band. Steepest near (1/b)^(1/r) = {bands ** (-1 / rows):.2f}:")
    print("   similarity   measured   1-(1-s^r)^b")
    for s in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        rate = measured_rate(s, bands, rows)
        print(f"   {s:10.2f}   {rate:8.3f}   {catch_rate(s, bands, rows):11.3f}  |{'o' * round(30 * rate)}")
    print()

    texts, config = corpus(documents, random.Random(0)), DedupConfig()
    naive, slow = timed(deduplicate_naive, texts, config)
    found, fast = timed(deduplicate, texts, config)
    dropped = [int((first != np.arange(len(texts))).sum()) for first in (naive, found.first)]
    pairs = len(texts) * (len(texts) - 1) // 2
    print(f"4. {len(texts)} documents. Each with each: {pairs:,} comparisons, {slow:.2f} s, {dropped[0]} repeat an earlier one.")
    print(f"   By bands: {found.compared} comparisons, {fast:.2f} s, {dropped[1]} found.")
    cluster = found.clusters()[0]
    print(f"   The largest cluster has {len(cluster)}; the first is kept:")
    for i in cluster[:3]:
        print(f"   {i:5}  {texts[i][:90]} …")
    print("   `tinyllm data dedup` does this with files, and writes down what it left out.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=400, help="of the last part")
    main(**vars(parser.parse_args()))
