"""Byte-pair encoding on plain ids. Ids 0 to 255 are the bytes; merge number i makes the token with id 256 + i.

Training.  Count every pair of neighbouring ids. Write the most frequent pair as one new id. Repeat.
Encoding.  Replay the merges on new bytes, the earliest learned first.

    "aaabdaaabac"                        97 97 97 98 100 97 97 97 98 97 99
    (97, 97) occurs 4 times  -> 256      256 97 98 100 256 97 98 97 99
    (97, 98) occurs 2 times  -> 257      256 257 100 256 257 97 99
    (256, 257) occurs twice  -> 258      258 100 258 97 99

Ties.  Of equally frequent pairs the smaller one wins, first ids compared first, where bytes stand in GPT-2's order (visible characters,
then the others) and tokens follow in the order they were learned. Hugging Face's trainer does the same, so the merges come out the same.

Here stands the definition, in its plainest form. learn.py and merge_many.py have the fast twins.

Pieces.  Nothing is merged across pieces (see patterns.py), so a corpus is only its distinct pieces with their counts.

Source: Gage 1994, "A New Algorithm for Data Compression"; Sennrich, Haddow & Birch 2016 for words; Radford et al. 2019 for bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

Pair = tuple[int, int]

# GPT-2's byte order: the bytes that are a visible character in Latin-1 come first (33-126, 161-172, 174-255), then all others.
BYTE_ORDER = sorted(range(256), key=lambda byte: (not chr(byte).isprintable() or chr(byte) == " ", byte))
PLACE_OF_BYTE = [BYTE_ORDER.index(byte) for byte in range(256)]


# ---- the definition ----

def count_pairs(words: Mapping[tuple[int, ...], int]) -> dict[Pair, int]:
    """How often each pair of neighbours occurs in words that occur so often.     {(1, 2, 1, 2): 3} -> {(1, 2): 6, (2, 1): 3}"""
    counts: dict[Pair, int] = {}
    for word, count in words.items():
        for pair in pairwise(word):
            counts[pair] = counts.get(pair, 0) + count
    return counts


def merge(ids: Sequence[int], pair: Pair, new_id: int) -> tuple[int, ...]:
    """Replace the pair wherever it occurs, from left to right.     (1, 2, 3, 1, 2), (1, 2), 256 -> (256, 3, 256)"""
    first, second = pair
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == first and i + 1 < len(ids) and ids[i + 1] == second:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return tuple(merged)


def tie_break(pair: Pair) -> Pair:
    """Where the pair stands among equally frequent ones: the smallest wins."""
    first, second = (PLACE_OF_BYTE[token] if token < 256 else token for token in pair)
    return first, second


def train_naive(pieces: Mapping[bytes, int], merge_count: int) -> list[Pair]:
    """The most frequent pair, again and again: recounts everything for each merge, so only for small texts and for tests.

    pieces: distinct pieces of text and how often each occurs. Returns at most merge_count merges, fewer when no pair is left.
    """
    words = {tuple(piece): count for piece, count in pieces.items()}
    merges: list[Pair] = []
    while len(merges) < merge_count and (counts := count_pairs(words)):
        best = min(counts, key=lambda pair: (-counts[pair], tie_break(pair)))
        words = {merge(word, best, 256 + len(merges)): count for word, count in words.items()}
        merges.append(best)
    return merges


def merge_steps(data: bytes, ranks: Mapping[Pair, int]) -> Iterator[tuple[Pair, tuple[int, ...]]]:
    """Each merge that encoding applies to a piece, and the ids after it. ranks: pair -> id of its token; a lower id was learned earlier."""
    ids = tuple(data)
    while known := [pair for pair in pairwise(ids) if pair in ranks]:
        first_learned = min(known, key=lambda pair: ranks[pair])
        ids = merge(ids, first_learned, ranks[first_learned])
        yield first_learned, ids


def encode_naive(data: bytes, ranks: Mapping[Pair, int]) -> list[int]:
    """Replay the merges on one piece. Every step scans the whole piece."""
    ids = tuple(data)
    for _, ids in merge_steps(data, ranks):     # noqa: B007  the last ids are the result
        pass
    return list(ids)


# ---- one piece, fast ----

def encode_heap(data: bytes, ranks: Mapping[Pair, int]) -> list[int]:
    """The ids of encode_naive in n·log n steps: a heap holds the merges that are possible now, earliest learned first, then leftmost.

    A token sits at the position of its first byte; left and right are its neighbours' positions, -1 at the ends.
    """
    ids, left, right = list(data), list(range(-1, len(data) - 1)), [*range(1, len(data)), -1]
    heap = [(ranks[pair], position) for position, pair in enumerate(pairwise(data)) if pair in ranks]
    heapify(heap)
    while heap:
        new_id, position = heappop(heap)
        after = right[position]
        if after < 0 or ranks.get((ids[position], ids[after])) != new_id:
            continue                                                # an overlapping or earlier merge took one of the two
        ids[position], ids[after] = new_id, -1
        before, beyond = left[position], right[after]
        right[position] = beyond
        if before >= 0 and (rank := ranks.get((ids[before], new_id))) is not None:
            heappush(heap, (rank, before))
        if beyond >= 0:
            left[beyond] = position
            if (rank := ranks.get((new_id, ids[beyond]))) is not None:
                heappush(heap, (rank, position))
    return [token for token in ids if token >= 0]
