"""Shingles, MinHash, buckets, clusters: against their definitions, and the catch rate against its formula."""
import random

import numpy as np
import pytest

from tinyllm.data.dedup import DedupConfig, UnionFind, deduplicate, deduplicate_naive
from tinyllm.data.minhash import (
    band_keys,
    catch_rate,
    jaccard,
    jaccard_naive,
    minima,
    normalised,
    permutations,
    shingle_hashes,
    shingle_set,
    signature_naive,
    signatures,
)

ODD = ["", "a", "aaaa", "é😀" * 20, "日本語のテキスト", "x" * 1000, "The cat sat on the mat, and the cat sat still.", "\ud800 broken"]


def sentence(rng, count=60):
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(count))


def edited(rng, text, changes):
    words = text.split()
    for _ in range(changes):
        words[rng.randrange(len(words))] = sentence(rng, 1)
    return " ".join(words)


def sets_of_similarity(rng, common, each, pairs):
    """pairs·2 sets of random numbers, of which neighbours share `common` and have `each` of their own: J = common/(common + 2·each).

    Returns all numbers one set after the other, and where each set begins.
    """
    shared = rng.integers(0, 2**32, (pairs, 1, common), np.uint32).repeat(2, axis=1)
    own = rng.integers(0, 2**32, (pairs, 2, each), np.uint32)
    return np.concatenate([shared, own], axis=2).ravel(), np.arange(2 * pairs) * (common + each)


# ---- shingles ----


@pytest.mark.parametrize("n", [1, 3, 8])
def test_hashes_are_as_many_and_as_different_as_shingles(n):
    hashes, starts = shingle_hashes(ODD, n)
    parts = np.split(hashes, starts[1:])
    for text, part in zip(ODD, parts, strict=True):
        assert len(part) == max(1, len(text) - n + 1)
        assert len(np.unique(part)) == len(shingle_set(text.ljust(n, "\0"), n))
        np.testing.assert_array_equal(part, shingle_hashes([text], n)[0])  # neighbours in a batch change nothing


@pytest.mark.parametrize("n", [1, 4, 9])
def test_jaccard_is_that_of_the_definition(n):
    rng = random.Random(0)
    for changes in (0, 1, 5, 30):
        a = sentence(rng)
        b = edited(rng, a, changes)
        ours = jaccard(*(np.unique(shingle_hashes([text], n)[0]) for text in (a, b)))
        assert ours == jaccard_naive(a, b, n)


def test_what_does_not_matter_is_made_equal():
    assert normalised("  Ein\tCafe\u0301\r\n\u3000STRASSE ") == normalised("ein café straße") == "ein café strasse"
    assert normalised(" \n") == ""


# ---- signatures ----


def test_permutations_are_permutations():
    a, b = permutations(50, seed=1)
    assert (a % 2 == 1).all()
    x = np.arange(2**16, dtype=np.uint32) << np.uint32(16)  # onto: a·x + b of all multiples of 2¹⁶ are as many different numbers
    for i in range(5):
        assert len(np.unique(a[i] * x + b[i])) == len(x)
    assert (permutations(50, seed=1) == permutations(50, seed=1)).all() and (permutations(50, seed=2)[0] != a).any()


def test_minima_are_the_smallest_images():
    rng = np.random.default_rng(0)
    x, starts, ab = rng.integers(0, 2**32, 100, np.uint32), np.array([0, 1, 40]), permutations(7, 0)
    for d, part in enumerate(np.split(x, starts[1:])):
        expected = [min((int(a) * int(v) + int(b)) % 2**32 for v in part) for a, b in ab.T]
        assert minima(x, starts, ab)[d].tolist() == expected


def test_signatures_agree_as_often_as_shingles_do():
    rng = random.Random(3)
    a = sentence(rng)
    b = edited(rng, a, 6)
    s = jaccard_naive(a, b, 5)
    fast = signatures([a, b], 5, permutations(4000, 0))
    naive = [signature_naive(text, 5, 200, 0) for text in (a, b)]
    assert 0.4 < s < 0.9
    for agree in ((fast[0] == fast[1]), np.array(naive[0]) == np.array(naive[1])):
        assert abs(agree.mean() - s) < 4 * np.sqrt(s * (1 - s) / len(agree))


def test_keys_are_equal_where_all_rows_of_a_band_are():
    rng = np.random.default_rng(0)
    signature = rng.integers(0, 2, (200, 12), np.uint32)
    keys = band_keys(signature, 4)
    for band in range(4):
        rows = signature[:, 3 * band : 3 * band + 3]
        np.testing.assert_array_equal(keys[:, None, band] == keys[None, :, band], (rows[:, None] == rows[None]).all(-1))


@pytest.mark.parametrize("bands, rows", [(16, 8), (20, 5), (50, 2), (1, 3)])
def test_catch_rate_follows_its_formula(bands, rows):
    """Pairs of planted similarities are caught as often as 1-(1-s^r)^b says: each within four standard errors, and all by χ²."""
    rng, pairs, union, chi2 = np.random.default_rng(bands), 1000, 200, []
    for wanted in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
        similarity = (1 - (1 - wanted) ** (1 / bands)) ** (1 / rows)  # for which the formula gives about the wanted rate
        each = round(union * (1 - similarity) / 2)
        expected = catch_rate(1 - 2 * each / union, bands, rows)
        x, starts = sets_of_similarity(rng, union - 2 * each, each, pairs)
        keys = band_keys(minima(x, starts, permutations(bands * rows, seed=each)), bands)
        caught = (keys[::2] == keys[1::2]).any(1).mean()
        chi2.append((caught - expected) ** 2 / (expected * (1 - expected) / pairs))
        assert chi2[-1] < 16, (wanted, caught, expected)
    assert sum(chi2) < 7 + 3 * np.sqrt(2 * 7)


def test_catch_rate_of_whole_documents():
    """Through `deduplicate`: texts that repeat others in part. Each pair has a similarity of its own, so the rates are added up."""
    rng = random.Random(0)
    config = DedupConfig(threshold=0.05, bands=5, rows=6)
    texts, expected = [], []
    for changes in range(120):
        a = sentence(rng, 40)
        texts += [a, edited(rng, a, changes % 10)]
        s = jaccard_naive(*map(normalised, texts[-2:]), config.shingle)
        expected.append(catch_rate(s, config.bands, config.rows) if s < 1 else 1.0)
    first = deduplicate(texts, config).first
    caught = (first[::2] == first[1::2]).sum()
    variance = sum(p * (1 - p) for p in expected)
    assert variance > 5 and abs(caught - sum(expected)) < 4 * np.sqrt(variance)


# ---- documents ----


def corpus(seed):
    rng = random.Random(seed)
    texts = [sentence(rng, rng.randint(1, 60)) for _ in range(40)]
    texts += [edited(rng, rng.choice(texts), rng.randint(0, 4)) for _ in range(40)] + ODD + [rng.choice(texts).upper() for _ in range(5)]
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_finds_what_comparing_each_with_each_finds(threshold):
    config = DedupConfig(threshold=threshold, bands=200, rows=1, compare=1000)  # of rows=1 misses hardly anything
    for seed in range(3):
        texts = corpus(seed)
        found = deduplicate(iter(texts), config)
        np.testing.assert_array_equal(found.first, deduplicate_naive(texts, config))
        assert found.not_compared == 0
        for link in found.links:
            a, b = normalised(texts[link.later]), normalised(texts[link.earlier])
            assert link.earlier < link.later and link.similarity == pytest.approx(jaccard_naive(a, b, config.shingle))
            assert link.exact == (a == b) or not link.exact


def test_exact_duplicates_alone():
    texts = ["One two", "three", "one\n two ", "", " ", "THREE"]
    for config in (DedupConfig(threshold=1), DedupConfig()):
        found = deduplicate(texts, config)
        assert found.first.tolist() == [0, 1, 0, 3, 3, 1] and len(found.links) == 3 and all(link.exact for link in found.links)
        assert found.clusters() == [[0, 2], [1, 5], [3, 4]]


@pytest.mark.parametrize("texts", [[], ["one"], [""]])
def test_nothing_or_one(texts):
    found = deduplicate(texts, DedupConfig())
    assert found.first.tolist() == list(range(len(texts))) and found.clusters() == []


def test_many_copies_take_few_comparisons_and_all_are_found():
    rng = random.Random(0)
    original = sentence(rng, 200)
    texts = [f"{original} {i}" for i in range(300)]
    for compare in (1, 32):
        found = deduplicate(texts, DedupConfig(compare=compare))
        assert (found.first == 0).all() and found.compared == 299 and found.not_compared == 0


def test_what_is_not_compared_is_counted():
    """All share a first half: alike enough for a bucket, not for the threshold."""
    rng = random.Random(0)
    start = sentence(rng, 60)
    texts = [f"{start} {sentence(rng, 40)}" for _ in range(20)]
    config = DedupConfig(threshold=0.9, bands=200, rows=1, compare=1000)
    full = deduplicate(texts, config)
    assert full.compared == 190 and full.not_compared == 0
    few = deduplicate(texts, DedupConfig(threshold=0.9, bands=200, rows=1, compare=2))
    assert few.compared < 190 and few.compared + few.not_compared >= 190


def test_union_find():
    sets = UnionFind(6)
    for i, j in ((4, 5), (3, 4), (1, 2), (2, 5)):
        sets.unite(i, j)
    assert sets.find(np.arange(6)).tolist() == [0, 1, 1, 1, 1, 1] and sets.find(3) == 1


@pytest.mark.parametrize("option, value", [("threshold", 0), ("threshold", 1.1), ("shingle", 0), ("bands", 0), ("rows", 0), ("compare", 0)])
def test_settings_have_limits(option, value):
    with pytest.raises(ValueError, match=f"^--{option} is {value}: it must be"):
        DedupConfig(**{option: value})
