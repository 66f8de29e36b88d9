"""Documents of different lengths share rows, so that little of a batch is padding: packing, best fit first.

The longest document first, each into the row that it fills best: the fullest one that still has room for it, a new one where none has.
It never takes more than 11/9 of the fewest possible rows, and a few (Johnson 1974); on texts, where short ones fill what long ones
leave, hardly a row more.

    lengths 6 5 4 3 2 into rows of 10:     6 4 | 5 3 2          in the order in which they come:     6 | 5 4 | 3 2 …

A document that fits into a row is never cut: what a question asks of a story stands in the same row. Rows carry document numbers (`Batch.documents`), so that
attention stays inside one. Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
"""
import heapq
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tinyllm.data.batches import IGNORE, Batch
from tinyllm.data.rows import padded, shuffled


def pack_by_definition(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which documents share a row, by number: every row looked at for every document.     See `pack`."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in _longest_first(lengths, capacity):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[number]]
        row = min(fitting, key=lambda row: room[row], default=len(rows))  # of equally full ones the first
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(number)
        room[row] -= lengths[number]
    return rows


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which documents share a row, by number; rows of at most `capacity` tokens. A pure function: the same rows every time.

    Rows wait in heaps by the room they have left, and bit r of `some` says whether there is one with room r: the fullest that still fits is
    the lowest bit from the document's length on. So each document costs about the same, however many rows there are.

    Raises ValueError for a document that is longer than a row, or empty.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    some = 0
    for number in _longest_first(lengths, capacity):
        length = lengths[number]
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(with_room[room])
            some ^= (not with_room[room]) << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        heapq.heappush(with_room[room - length], row)
        some |= 1 << (room - length)
    return rows


def _longest_first(lengths: Sequence[int], capacity: int) -> list[int]:
    for number, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"document {number + 1} has {length} tokens, but a row holds from 1 to {capacity}: shorten it, or take a longer --context")
    return sorted(range(len(lengths)), key=lambda number: -lengths[number])  # stable: equally long ones in their order


class PackedRows:
    """Batches of whole documents, packed into rows of at most `context` tokens, each document seeing itself alone.

    tokens : every document followed by end_of_text, as `prepare` writes them.     Raises ValueError where there is none, or nothing to learn.

    A document's inputs begin with the end_of_text before it and its targets end with its own, so row, inputs and targets are

        inputs    <|endoftext|>  a  b  <|endoftext|>  x  y  z        = end_of_text and then the tokens, without the last
        targets         a        b  …        x        y  z  …        = the tokens

    A document that is longer than a row is cut into pieces of a row each, and a rest.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch: int, seed: int, end_of_text: int):
        if not len(tokens) or context < 1 or batch < 1:
            raise ValueError(f"packing needs tokens, and a context and batch of at least 1; found {len(tokens)}, {context} and {batch}")
        self.tokens, self.size, self.seed, self.end_of_text = tokens, batch, seed, end_of_text
        self.pieces = _pieces(tokens, context, end_of_text)
        self.rows = pack((self.pieces[:, 1] - self.pieces[:, 0]).tolist(), context)

    def batch(self, step: int) -> Batch:
        """The batch of a step, in random order without repetition (see `shuffled`)."""
        return self._of(shuffled(step, self.size, len(self.rows), self.seed))

    def in_order(self, every: int = 1) -> Iterator[Batch]:
        """Each row once; or of the batches each `every`-th. The last one may be smaller."""
        for start in range(0, len(self.rows), self.size * every):
            yield self._of(range(start, min(start + self.size, len(self.rows))))

    @property
    def batches(self) -> int:
        """How many batches all rows make."""
        return -(-len(self.rows) // self.size)

    def _of(self, numbers: Iterable[int]) -> Batch:
        rows = [[np.arange(*self.pieces[i]) for i in self.rows[number]] for number in numbers]
        places = padded([np.concatenate(row) for row in rows], fill=-1)
        documents = padded([np.repeat(np.arange(len(row)), [len(piece) for piece in row]) for row in rows], fill=IGNORE)
        before = np.where(places > 0, self.tokens[np.maximum(places - 1, 0)], self.end_of_text)
        return Batch(np.where(places < 0, 0, before).astype(np.int64), np.where(places < 0, IGNORE, self.tokens[places].astype(np.int64)), documents)


def _pieces(tokens: np.ndarray, context: int, end_of_text: int) -> np.ndarray:
    """Where each piece begins and ends: a document, or as much of it as fits into a row.     -> (pieces, 2) int64

    For a document of n tokens that is ⌈n/context⌉ pieces, of which the k-th begins k·context after it.
    """
    ends = np.append(np.flatnonzero(tokens[:-1] == end_of_text) + 1, len(tokens))
    starts = np.append(0, ends[:-1])
    counts = -(-(ends - starts) // context)
    k = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(starts, counts) + k * context
    return np.stack([first, np.minimum(first + context, np.repeat(ends, counts))], axis=1)
