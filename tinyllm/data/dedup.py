"""Find documents that say the same as an earlier one: exact duplicates by hash, near duplicates by MinHash, see minhash.py.

    1. a document whose normalised text has been seen is an exact duplicate
    2. the others get a signature; those that agree in a band stand in one bucket and are candidates
    3. two candidates are near duplicates if their true Jaccard similarity reaches the threshold
    4. clusters are what is connected so, by union-find; of each the first document is kept

In memory stays what a document is reduced to: 16 bytes of hash and 8 bytes a band, about 300 bytes with what Python adds, and the
longest document. The texts wait in a temporary file until one has to be compared.
"""
import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from tinyllm.config import check, setting
from tinyllm.data.minhash import band_keys, jaccard, jaccard_naive, normalised, permutations, shingle_hashes, signatures

BATCH = 2**16  # characters: their hashes, and one permutation of them, fit into a core's own cache


@dataclass(frozen=True)
class DedupConfig:
    """What counts as the same, and how much work finding it may be."""

    threshold: float = setting(0.8, "Jaccard similarity from which two documents are near duplicates; 1: none but exact ones",
                               minimum=0.05, maximum=1)  # fmt: skip
    shingle: int = setting(8, "characters in a shingle", minimum=1, maximum=1000)
    bands: int = setting(16, "bands of a signature: more of them find more of what is alike", minimum=1, maximum=1000)
    rows: int = setting(8, "rows of a band: more of them compare less of what is not", minimum=1, maximum=1000)
    compare: int = setting(32, "comparisons that one document may start in one bucket; the report counts what is left out", minimum=1)
    seed: int = setting(0, "of the random permutations", minimum=0)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class Link:
    """Document `later` was put into the cluster of `earlier`, because they are this similar (1 for exact duplicates)."""

    later: int
    earlier: int
    similarity: float
    exact: bool


@dataclass
class Duplicates:
    """What `deduplicate` found. Documents are named by their place in the order in which they came."""

    first: np.ndarray  # (documents,) the first document of each one's cluster: its own number if it is to be kept
    links: list[Link] = field(default_factory=list)
    compared: int = 0  # pairs whose true similarity was computed
    not_compared: int = 0  # pairs of candidates beyond DedupConfig.compare

    def clusters(self) -> list[list[int]]:
        """The clusters of more than one document, the largest first."""
        order = np.argsort(self.first, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(self.first[order])) + 1)
        return sorted((group.tolist() for group in groups if len(group) > 1), key=lambda group: (-len(group), group))

    def similarity(self) -> dict[int, float]:
        """For each document of a cluster the highest similarity to another of it, of those that were computed."""
        highest: dict[int, float] = {}
        for link in self.links:
            for end in (link.later, link.earlier):
                highest[end] = max(highest.get(end, 0.0), link.similarity)
        return highest


class UnionFind:
    """Sets that can only be united; each is named by its smallest member."""

    def __init__(self, count: int):
        self.parent = np.arange(count)

    def find(self, i):
        """The name of the set that i is in, or of each i of an array. i is hung right below it, so that the next search is short."""
        root = self.parent[i]
        while (self.parent[root] != root).any():
            root = self.parent[root]
        self.parent[i] = root
        return root

    def unite(self, i: int, j: int) -> None:
        """Make one set of i's and j's."""
        i, j = sorted((self.find(i), self.find(j)))
        self.parent[j] = i


def deduplicate_naive(texts: Sequence[str], config: DedupConfig) -> np.ndarray:
    """The definition: compare each with each. What `deduplicate` finds but for what no band catches."""
    texts, sets = [normalised(text) for text in texts], UnionFind(len(texts))
    for i, j in combinations(range(len(texts)), 2):
        if texts[i] == texts[j] or config.threshold < 1 and jaccard_naive(texts[i], texts[j], config.shingle) >= config.threshold:
            sets.unite(i, j)
    return sets.find(np.arange(len(texts)))


def deduplicate(texts: Iterable[str], config: DedupConfig, folder: Path | None = None) -> Duplicates:
    """Which of the texts repeat an earlier one. They are read once; `folder` is for the temporary file (None: the system's own).

    Errors: OSError where that file does not fit.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        store = _Store(file)
        exact, unique, keys = _reduce(texts, config, store)
        sets, found = UnionFind(len(unique)), Duplicates(np.arange(len(unique) + len(exact)))
        if config.threshold < 1:
            for bucket, before in _buckets(keys):
                _unite_bucket(bucket, before, sets, store, config, found)
    number = np.array(unique, np.int64)  # so far, documents were numbered among those with a text of their own: now among all
    found.first[number] = number[sets.find(np.arange(len(unique)))]
    for link in exact:
        found.first[link.later] = found.first[link.earlier]
    near = [Link(unique[link.later], unique[link.earlier], link.similarity, exact=False) for link in found.links]
    return replace(found, links=exact + near)


class _Store:
    """Texts in a file, one after the other."""

    def __init__(self, file):
        self.file, self.ends = file, array("q", [0])

    def append(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.file.write(data)
        self.ends.append(self.ends[-1] + len(data))

    def __getitem__(self, i: int) -> str:
        self.file.seek(self.ends[i])
        return self.file.read(self.ends[i + 1] - self.ends[i]).decode("utf-8", "surrogatepass")


def _reduce(texts: Iterable[str], config: DedupConfig, store: _Store) -> tuple[list[Link], array, np.ndarray]:
    """Exact duplicates; the numbers of all other texts, which go into the store; and their band keys (unique, b)."""
    ab = permutations(config.bands * config.rows, config.seed)
    seen: dict[bytes, int] = {}
    exact, unique, keys = [], array("q"), [np.empty((0, config.bands), np.uint64)]
    batch, size = [], 0

    def flush() -> None:
        if batch and config.threshold < 1:
            keys.append(band_keys(signatures(batch, config.shingle, ab), config.bands))
        batch.clear()

    for number, text in enumerate(texts):
        text = normalised(text)
        earlier = seen.setdefault(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), number)
        if earlier != number:
            exact.append(Link(number, earlier, 1.0, exact=True))
            continue
        unique.append(number)
        store.append(text)
        batch.append(text)
        size += max(len(text), config.shingle)
        if size >= BATCH:
            flush()
            size = 0
    flush()
    return exact, unique, np.concatenate(keys)


def _buckets(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each band, the documents that agree in it (numbers in order), and their keys in the bands before.     (D, b) -> (m,), (m, band)"""
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        edges = np.flatnonzero(np.diff(keys[order, band])) + 1
        starts, ends = np.append(0, edges), np.append(edges, len(order))
        for several in np.flatnonzero(ends - starts > 1):
            bucket = order[starts[several] : ends[several]]
            yield bucket, keys[bucket, :band]


def _unite_bucket(bucket, before, sets: UnionFind, store: _Store, config: DedupConfig, found: Duplicates) -> None:
    """Compare the documents of a bucket, and unite those that are alike.

    A pair is left out if it is united already, which cannot change a cluster, so that m copies take m - 1 comparisons and not
    m²/2; and if it agrees in an earlier band, where it has been dealt with.
    """
    left_out = 0
    for i, number in enumerate(bucket.tolist()):
        roots = sets.find(bucket)
        if (roots == roots[0]).all():
            return  # and nothing that was left out can matter any more
        others = bucket[i + 1 :][(roots[i + 1 :] != roots[i]) & ~(before[i + 1 :] == before[i]).any(1)].tolist()
        left_out += max(0, len(others) - config.compare)
        own = _shingles(store[number], config.shingle) if others else None
        for other in others[: config.compare]:
            similarity = jaccard(own, _shingles(store[other], config.shingle))
            found.compared += 1
            if similarity >= config.threshold:
                sets.unite(number, other)
                found.links.append(Link(other, number, similarity, exact=False))
    found.not_compared += left_out


def _shingles(text: str, n: int) -> np.ndarray:
    """The set of a text's shingles, as sorted numbers."""
    return np.unique(shingle_hashes([text], n)[0])
