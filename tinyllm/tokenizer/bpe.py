"""Byte-pair encoding on plain ids. Ids 0 to 255 are the bytes; merge number i makes the token with id 256 + i.

Training.  Count every pair of neighbouring ids. Write the most frequent pair as one new id. Repeat.
Encoding.  Replay the merges on new bytes, the earliest learned first.

    "aaabdaaabac"                        97 97 97 98 100 97 97 97 98 97 99
    (97, 97) occurs 4 times  -> 256      256 97 98 100 256 97 98 97 99
    (97, 98) occurs 2 times  -> 257      256 257 100 256 257 97 99
    (256, 257) occurs twice  -> 258      258 100 258 97 99

Ties.  Of equally frequent pairs the smaller one wins, first ids compared first, where bytes stand in GPT-2's order (visible characters,
then the others) and tokens follow in the order they were learned. Hugging Face's trainer does the same, so the merges come out the same.

Pieces.  Nothing is merged across pieces (see patterns.py), so a corpus is only its distinct pieces with their counts.

Source: Gage 1994, "A New Algorithm for Data Compression"; Sennrich, Haddow & Birch 2016 for words; Radford et al. 2019 for bytes.
"""

from collections import defaultdict
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


# ---- the fast twins ----

def train_incremental(pieces: Mapping[bytes, int], merge_count: int) -> list[Pair]:
    """The merges of train_naive, touching only what each merge changes.

    All pieces lie one after another in `ids`. A token sits at the position of its first byte; left and right are its neighbours'
    positions, -1 at the ends of a piece. counts[pair] is always exact (of pairs not yet merged). places[pair] lists where the pair has
    appeared, from left to right; some are out of date and are recognised by looking. The heap may hold out-of-date counts, too: only
    pairs with the newest token ever gain, so those are pushed, and a pair that has lost is put back with its true count when it comes up.
    """
    ids, left, right, weight = _lay_out(pieces)
    counts: dict[Pair, int] = defaultdict(int)
    places: dict[Pair, list[int]] = defaultdict(list)
    for position, after in enumerate(right):
        if after >= 0:
            pair = ids[position], ids[after]
            counts[pair] += weight[position]
            places[pair].append(position)
    heap = [(-count, tie_break(pair), pair) for pair, count in counts.items()]
    heapify(heap)

    merges: list[Pair] = []
    while heap and len(merges) < merge_count:
        claimed, tie, pair = heappop(heap)
        if counts[pair] != -claimed:
            if counts[pair] > 0:
                heappush(heap, (-counts[pair], tie, pair))
            continue
        new_id, changed = 256 + len(merges), set()
        for position in places.pop(pair):
            after = right[position]
            if after < 0 or (ids[position], ids[after]) != pair:
                continue                                            # an overlapping or earlier merge took one of the two
            ids[position], ids[after] = new_id, -1
            before, beyond, count = left[position], right[after], weight[position]
            right[position] = beyond
            if before >= 0:
                counts[ids[before], pair[0]] -= count
                gained = ids[before], new_id
                counts[gained] += count
                places[gained].append(before)
                changed.add(gained)
            if beyond >= 0:
                left[beyond] = position
                counts[pair[1], ids[beyond]] -= count
                gained = new_id, ids[beyond]
                counts[gained] += count
                places[gained].append(position)
                changed.add(gained)
        counts[pair] = 0
        for gained in changed:
            if counts[gained] > 0:                                  # in a run, a pair may appear and vanish in one pass
                heappush(heap, (-counts[gained], tie_break(gained), gained))
        merges.append(pair)
    return merges


def _lay_out(pieces: Mapping[bytes, int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, left and right neighbours' positions, and the piece's count, for every byte of every piece."""
    ids: list[int] = []
    left: list[int] = []
    right: list[int] = []
    weight: list[int] = []
    for piece, count in pieces.items():
        start, stop = len(ids), len(ids) + len(piece)
        if start < stop:
            ids += piece
            left += [-1, *range(start, stop - 1)]
            right += [*range(start + 1, stop), -1]
            weight += [count] * len(piece)
    return ids, left, right, weight


def encode_heap(data: bytes, ranks: Mapping[Pair, int]) -> list[int]:
    """The ids of encode_naive in n·log n steps: a heap holds the merges that are possible now, earliest learned first, then leftmost."""
    ids, left, right, _ = _lay_out({data: 1})
    heap = [(ranks[pair], position) for position, pair in enumerate(pairwise(data)) if pair in ranks]
    heapify(heap)
    while heap:
        new_id, position = heappop(heap)
        after = right[position]
        if after < 0 or ranks.get((ids[position], ids[after])) != new_id:
            continue
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
