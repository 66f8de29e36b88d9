"""Has a benchmark leaked into the data? A model that has read a question measures its memory, not what it has understood.

An item of the benchmark is contaminated as far as its n-grams of words stand in the data; n = 13 is the usual length, long enough that two
authors hardly ever write the same by chance. Words are compared without case and without what stands between them.
Source: Brown et al. 2020 (GPT-3), appendix C.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.data.measures import WORD
from tinyllm.data.minhash import BASE, mixed
from tinyllm.data.text import Document


@dataclass(frozen=True)
class Overlap:
    """An item of a benchmark, and how much of it stands in the data."""

    item: Document
    ngrams: int  # different n-grams of the item; 0: it has fewer than n words, so that nothing can be said
    found: int  # of these, in the data
    source: str = ""  # of the first document with one of them
    example: str = ""  # the words of the item's first n-gram that was found

    @property
    def share(self) -> float:
        """Of the item's n-grams, between 0 and 1."""
        return self.found / self.ngrams if self.ngrams else 0.0


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation; a letter of a script without spaces is one."""
    return [word.casefold() for word in WORD.findall(text)]


def contamination_naive(benchmark: Sequence[Document], documents: Iterable[Document], n: int) -> list[tuple[int, int]]:
    """The definition: for each item (different n-grams, of which in the data)."""
    def ngrams(text):
        all_words = words(text)
        return {tuple(all_words[i : i + n]) for i in range(len(all_words) - n + 1)}

    data = set().union(*(ngrams(document.text) for document in documents))
    return [(len(own), len(own & data)) for own in (ngrams(item.text) for item in benchmark)]


def contamination(benchmark: Sequence[Document], documents: Iterable[Document], n: int = 13) -> list[Overlap]:
    """For each item of the benchmark, how much of it the documents hold. They are read once; only the benchmark is kept in memory.

    Words get numbers, those that no item has all 0; an n-gram is a 64-bit hash of n numbers, looked up in the sorted ones of the benchmark.
    Errors: ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least one word, found n = {n}")
    numbers: dict[str, int] = {}
    for item in benchmark:
        for word in words(item.text):
            numbers.setdefault(word, len(numbers) + 1)
    own = [_hashes(item.text, numbers, n) for item in benchmark]
    wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *own]))
    seen_in = np.full(len(wanted), -1)  # for each n-gram the place in `sources` of the first document with it
    sources: list[str] = []
    for document in documents:
        hashes = _hashes(document.text, numbers, n)
        places = np.searchsorted(wanted, hashes)
        places = places[wanted[np.minimum(places, len(wanted) - 1)] == hashes] if len(wanted) else places[:0]
        new = places[seen_in[places] < 0]
        if len(new):
            seen_in[new] = len(sources)
            sources.append(document.source)
    return [_overlap(item, hashes, seen_in[np.searchsorted(wanted, hashes)], sources, n) for item, hashes in zip(benchmark, own, strict=True)]


def _hashes(text: str, numbers: dict[str, int], n: int) -> np.ndarray:
    """A number for each n-gram of a text, in order: Σ_j w_j·BASE^(n-1-j) mod 2⁶⁴ of its words' numbers.     (words - n + 1,) uint64"""
    w = mixed(np.array([numbers.get(word, 0) for word in words(text)], np.uint64))
    hashes = np.zeros(max(0, len(w) - n + 1), np.uint64)
    for j in range(n if len(hashes) else 0):
        hashes *= BASE
        hashes += w[j : j + len(hashes)]
    return hashes


def _overlap(item: Document, hashes: np.ndarray, seen_in: np.ndarray, sources: list[str], n: int) -> Overlap:
    hits = np.flatnonzero(seen_in >= 0)
    if not len(hits):
        return Overlap(item, len(np.unique(hashes)), 0)
    first = int(hits[0])
    example = " ".join(words(item.text)[first : first + n])
    return Overlap(item, len(np.unique(hashes)), len(np.unique(hashes[hits])), sources[seen_in[first]], example)
