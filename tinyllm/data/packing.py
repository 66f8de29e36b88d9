"""Documents of different lengths share rows, so that little of a batch is padding: packing, best fit first.

The longest document first, each into the row that it fills best: the fullest one that still has room for it, a new one where none has.
It never takes more than 11/9 of the fewest possible rows, and a few (Johnson 1974); on texts, where short ones fill what long ones
leave, hardly a row more.

    lengths 6 5 4 3 2 into rows of 10:     6 4 | 5 3 2          in the order in which they come:     6 | 5 4 | 3 2 …

A document is never cut: what a question asks of a story stands in the same row. Rows carry document numbers (`Batch.documents`), so that
attention stays inside one. Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
"""
import heapq
from collections.abc import Sequence


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
