"""Merging thousands of pieces at once: the fast twin of encode_naive for pieces of up to a few dozen bytes.

Every round costs as much as a piece is long, and there are as many rounds as merges, so the time grows with the square of the length.
"""

from collections.abc import Sequence

import numpy as np

from tinyllm.tokenizer.bpe import Pair, encode_heap
from tinyllm.tokenizer.pieces import WORD, KeyTable

WIDTHS = (16, 32, 64)                   # pieces of at most so many bytes are merged together, longer ones one by one
CELLS = 1 << 16                         # ids that are worked on together: their arrays stay in the cache
NOTHING = np.iinfo(WORD).max            # stands behind the end of a piece; no pair holds it
NO_RANK = np.uint32(0xFFFFFFFF)         # the -1 of KeyTable.find as an unsigned number: comes after every rank


class Merger:
    """Encodes many pieces with the same merges."""

    def __init__(self, ranks: dict[Pair, int]):
        """ranks: pair -> id of its token, in the order learned."""
        self._ranks, self._pairs = ranks, KeyTable()
        self._pairs.add(*np.array(list(ranks), WORD).reshape(-1, 2).T)

    def encode(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of all pieces in any order; where in there those of each piece begin; how many they are.     (m,) uint32, (n,), (n,)"""
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        begins, counts = np.zeros((2, len(pieces)), np.int64)
        ids, total = [np.zeros(0, np.uint32)], 0
        groups = np.searchsorted(WIDTHS, lengths)
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            chosen = [pieces[i] for i in members]
            found, count = self._together(chosen, WIDTHS[group]) if group < len(WIDTHS) else self._one_by_one(chosen)
            counts[members], begins[members] = count, total + np.cumsum(count) - count
            ids.append(found)
            total += len(found)
        return np.concatenate(ids), begins, counts

    def _one_by_one(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """All ids of the pieces, one piece after the other, and how many each piece has.     (m,) uint32, (n,) int64"""
        ids = [np.array(encode_heap(piece, self._ranks), np.uint32) for piece in pieces]
        return np.concatenate(ids), np.array(list(map(len, ids)))

    def _together(self, pieces: Sequence[bytes], width: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for pieces of at most `width` bytes."""
        ids = np.full((len(pieces), width), NOTHING, WORD)
        padded = np.frombuffer(b"".join(piece.ljust(width, b"\0") for piece in pieces), np.uint8).reshape(ids.shape)
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        np.copyto(ids, padded, where=np.arange(width) < lengths[:, None])
        rows = CELLS // width

        for start in range(0, len(ids), rows):
            self._merge_rows(ids[start : start + rows])
        there = ids != NOTHING
        return ids[there].astype(np.uint32), there.sum(1)

    def _merge_rows(self, ids: np.ndarray) -> None:
        """Apply the merges to each row in place.     (n, width) uint64, NOTHING where a row has ended

        In every round each row that still can makes one merge, the earliest learned, then leftmost, so a row becomes one shorter; only
        the two pairs that hold the new id have to be looked up again. Rows that are ready drop out.
        """
        rows, left = np.arange(len(ids)), ids.copy()
        ranks = self._find(left[:, :-1], left[:, 1:])
        for width in range(ids.shape[1] - 1, 0, -1):            # ids in a row after this round
            best = ranks.argmin(1)
            rank = ranks[np.arange(len(rows)), best]
            can = np.flatnonzero(rank != NO_RANK)
            if len(can) < len(rows):
                rows, left, ranks, best, rank = rows[can], left[can], ranks[can], best[can], rank[can]
            if not len(rows):
                break
            left[np.arange(len(rows)), best] = rank + WORD(256)
            left = left[np.arange(width + 1) != best[:, None] + 1].reshape(len(rows), width)
            ranks = ranks[np.arange(width) != best[:, None]].reshape(len(rows), width - 1)
            for place in (best - 1, best):
                there = np.flatnonzero((place >= 0) & (place < width - 1))
                at = place[there]
                ranks[there, at] = self._find(left[there, at], left[there, at + 1])
            ids[rows, :width], ids[rows, width:] = left, NOTHING

    def _find(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Number of the merge of each pair, NO_RANK where there is none.     two of one shape -> that shape, uint32"""
        return self._pairs.find(first.ravel(), second.ravel()).view(np.uint32).reshape(first.shape)
