"""Numbers for the distinct pieces of a text, found for a hundred thousand pieces at once: what a dictionary does, by array operations.

A piece of up to 15 bytes fits into two 64-bit words, its length in the last byte, so comparing two words compares pieces:

    " return"    20 72 65 74 75 72 6e 00 | 00 00 00 00 00 00 00 07

Of ordinary text 99 pieces in 100 are so short. A longer one gets a serial number from a dictionary and is known by that.
"""

from itertools import count

import numpy as np

WORD = np.uint64
LONGEST = 15                            # bytes of a piece that fit beside its length
MIX = WORD(0x9E3779B97F4A7C15), WORD(0xC2B2AE3D27D4EB4F)        # odd, with bits well mixed: 2^64 over the golden ratio, and a prime
LOW_BYTES = np.array([2 ** (8 * n) - 1 for n in range(9)], WORD)
LONG = WORD(255 << 56)                  # the second word of a piece that is known by its serial number


class KeyTable:
    """Distinct keys of two 64-bit words, numbered 0, 1, 2 … in the order they were added; looked up many at a time.

    Open addressing: a key lies in the slot that its hash names, or in the next one that was free. `_slots` holds numbers, -1 where free,
    and is at least four times as long as there are keys, so that one look is mostly enough.
    """

    def __init__(self):
        self.keys = np.empty((2, 256), WORD)
        self.count = 0
        self._slots = np.full(1024, -1, np.int32)

    def _home(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        mixed = first * MIX[0] ^ second * MIX[1]
        mixed ^= mixed >> WORD(32)
        mixed *= MIX[0]
        mixed >>= WORD(65 - len(self._slots).bit_length())
        return mixed.view(np.int64)

    def find(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The numbers of these keys, -1 for those that were never added.     (n,) uint64, (n,) uint64 -> (n,) int32"""
        slots = self._home(first, second)
        numbers = self._slots.take(slots)
        left = self._others(numbers, first, second)
        while left.size:
            slots[left] = (slots[left] + 1) & (len(self._slots) - 1)
            numbers[left] = found = self._slots[slots[left]]
            left = left[self._others(found, first[left], second[left])]
        return numbers

    def _others(self, numbers: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Places where a number is that of another key. (-1 looks up the last key, whatever it is: it is masked out.)"""
        differs = (self.keys[0].take(numbers, mode="wrap") != first) | (self.keys[1].take(numbers, mode="wrap") != second)
        return np.flatnonzero(differs & (numbers >= 0))

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """Number these keys, which must be distinct and new."""
        before, self.count = self.count, self.count + len(first)
        if self.count > self.keys.shape[1]:
            self.keys = np.concatenate([self.keys[:, :before], np.empty((2, 2 * self.count - before), WORD)], axis=1)
        self.keys[:, before : self.count] = first, second
        if 4 * self.count > len(self._slots):
            self._slots = np.full(1 << (8 * self.count).bit_length(), -1, np.int32)
            before = 0
        left = np.arange(before, self.count, dtype=np.int32)
        slots = self._home(*self.keys[:, before : self.count])
        while left.size:
            free = self._slots[slots] < 0
            self._slots[slots[free]] = left[free]       # of several that want a slot, the last one gets it
            lost = self._slots[slots] != left
            left, slots = left[lost], (slots[lost] + 1) & (len(self._slots) - 1)


class Pieces:
    """Distinct pieces of bytes, numbered 0, 1, 2 … in the order they were added."""

    def __init__(self):
        self._table = KeyTable()
        self._serials: dict[bytes, int] = {}
        self._long: dict[int, bytes] = {}
        self._next = count()

    def __len__(self) -> int:
        return self._table.count

    def keys(self, data: bytes, begins: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The keys of the pieces of `data` that begin there and are so long.     (n,), (n,) -> (n,) uint64, (n,) uint64"""
        words = np.ndarray(len(data) + 8, "<u8", buffer=data + bytes(16), strides=(1,))      # the 8 bytes that begin at every byte
        first = words.take(begins) & LOW_BYTES.take(np.minimum(lengths, 8))
        second = lengths.astype(WORD) << WORD(56)
        rest = np.flatnonzero(lengths > 8)
        second[rest] |= words.take(begins[rest] + 8) & LOW_BYTES.take(np.minimum(lengths[rest] - 8, 7))
        long = np.flatnonzero(lengths > LONGEST)
        spans = zip(begins[long].tolist(), lengths[long].tolist(), strict=True)
        first[long], second[long] = [self._serial(data[begin : begin + length]) for begin, length in spans], LONG
        return first, second

    def _serial(self, piece: bytes) -> int:
        serial = self._serials.get(piece)
        if serial is None:
            serial = self._serials.setdefault(piece, next(self._next))      # in one step: another thread may be here, too
            self._long[serial] = piece
        return serial

    def find(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The numbers of the pieces with these keys, -1 for new ones.     (n,), (n,) -> (n,) int32"""
        return self._table.find(first, second)

    def add(self, first: np.ndarray, second: np.ndarray) -> list[bytes]:
        """Number the distinct pieces among these keys, all new; returns them in the order of their numbers."""
        order = np.lexsort((first, second))
        first, second = first[order], second[order]
        distinct = np.ones(len(first), bool)
        distinct[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        first, second = first[distinct], second[distinct]
        self._table.add(first, second)
        return self._spell(first, second)

    def all(self) -> list[bytes]:
        """Every piece, in the order of their numbers."""
        return self._spell(*self._table.keys[:, : len(self)])

    def _spell(self, first: np.ndarray, second: np.ndarray) -> list[bytes]:
        data = np.stack([first, second], axis=1).astype("<u8").tobytes()
        lengths = (second >> WORD(56)).tolist()
        return [data[16 * i : 16 * i + n] if n <= LONGEST else self._long[int(first[i])] for i, n in enumerate(lengths)]
