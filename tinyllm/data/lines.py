"""Lines that stand in many documents: menus, licences, "all rights reserved". Counted in a table of fixed size.

A dictionary of all lines would outgrow the memory long before the text does. A count-min sketch has d rows of w counters; a line adds 1
to one counter of each row, chosen by a hash, and its count is read as the smallest of its d counters: others may have raised some
of them, hardly all. It is never too small, and of N counted lines too large by more than 2N/w with a probability of at most 2⁻ᵈ.
Source: Cormode & Muthukrishnan 2005.
"""
import hashlib

import numpy as np

DEPTH, WIDTH = 4, 2**22  # 64 MB: right for some million different lines, close enough for some ten million
SHORTEST = 20  # characters: a shorter line, such as "}" or "Yes.", may stand anywhere without being boilerplate


class LineCounts:
    """In how many documents does a line stand?"""

    def __init__(self):
        self.table = np.zeros((DEPTH, WIDTH), np.uint32)

    def add(self, text: str) -> None:
        """Count the lines of a document, each once."""
        for row, slots in zip(self.table, self._slots(set(_long_lines(text))), strict=True):
            np.add.at(row, slots, 1)

    def __call__(self, lines: list[str]) -> np.ndarray:
        """The number of documents that each line stands in.     n lines -> (n,)"""
        return np.min([row[slots] for row, slots in zip(self.table, self._slots(lines), strict=True)], axis=0)

    def remove(self, text: str, documents: int) -> tuple[str, int]:
        """The text without the lines that stand in at least so many documents, and how many that were."""
        long = _long_lines(text)
        drop = {line for line, count in zip(long, self(long).tolist(), strict=True) if count >= documents} if long else ()
        if not drop:
            return text, 0
        lines = text.split("\n")
        kept = [line for line in lines if line.strip() not in drop]
        return "\n".join(kept), len(lines) - len(kept)

    def _slots(self, lines) -> np.ndarray:
        """Four numbers below WIDTH for each line, one a row.     n lines -> (DEPTH, n)"""
        digests = b"".join(hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=4 * DEPTH).digest() for line in lines)
        return np.frombuffer(digests, "<u4").reshape(-1, DEPTH).T & np.uint32(WIDTH - 1)


def _long_lines(text: str) -> list[str]:
    return [stripped for line in text.split("\n") if len(stripped := line.strip()) >= SHORTEST]
