"""Where the pieces of a text begin, for the two published patterns, by array operations: the fast twin of patterns.py.

A regular expression walks through a text one character at a time. These patterns do not need that: what a character is (a letter, a
number, white space, something else) and what stands next to it tells almost everywhere whether a piece begins there. So each character
becomes one byte, its class, and the rules below are comparisons of that array with itself shifted by one. Only contractions, GPT-4's
groups of three digits and its white space around newlines are looked at one by one, and they are rare.

The classes come from the `regex` package itself, so both twins know the same Unicode.

Many short texts go through together, with an END behind each: a character of no class, over which no rule looks.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import regex

from tinyllm.tokenizer.patterns import GPT2, GPT4

LETTER, NUMBER, WHITE, OTHER = 1, 2, 4, 8       # one of these …
BLANK, NEWLINE, APOSTROPHE = 16, 32, 64         # … and perhaps one of these: " ", "\r" or "\n", "'"
SOLID = LETTER | NUMBER | OTHER
KIND = SOLID | WHITE
CLASSES = {r"\p{L}": LETTER, r"\p{N}": NUMBER, r"\s": WHITE, r"[^\s\p{L}\p{N}]": OTHER, " ": BLANK, r"[\r\n]": NEWLINE, "'": APOSTROPHE}
END_BYTE, END_CODE = b"\xff", 0x110000           # what no UTF-8 and no text contains; their class is 0


@cache
def class_table(size: int) -> np.ndarray:
    """The class of each of the first `size` code points.     (size,) uint8"""
    characters = np.arange(size, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    table = np.zeros(size, np.uint8)
    for pattern, bit in CLASSES.items():
        for run in regex.finditer(f"(?:{pattern})+", characters):
            table[run.start() : run.end()] |= bit
    return table


def codes_and_classes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Code point and class of each character of the texts and of the END behind each.     (n,) uint8 or uint32, (n,) uint8"""
    if all(map(str.isascii, texts)):
        data = joined(texts)
        return np.frombuffer(data, np.uint8), np.frombuffer(data.translate(bytes(class_table(128)) + bytes(128)), np.uint8)
    end = np.array([END_CODE], "<u4")
    codes = np.concatenate([a for text in texts for a in (np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4"), end)])
    return codes, np.append(class_table(END_CODE), np.uint8(0)).take(codes)


def joined(texts: Sequence[str]) -> bytes:
    """The UTF-8 of the texts with an END behind each."""
    return END_BYTE.join([*(text.encode("utf-8", "surrogatepass") for text in texts), b""])


def gpt2_starts(codes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Does a piece of GPT2 begin at this character?     (n,), (n,) -> (n,) bool,     n ≥ 1.     An END counts as a piece, too.

    A letter, number or other sign begins a piece where its kind begins, unless a blank stands before it: that one then begins the piece.
    White space begins a piece where its run begins, and again at its last character if anything follows: `\\s+(?!\\S)` leaves it over.
    """
    kind, before = classes & KIND, classes[:-1]
    starts = np.ones(len(classes), bool)
    starts[1:] = (kind[1:] != kind[:-1]) & (before & BLANK == 0)
    starts[:-1] |= (kind[:-1] == WHITE) & (kind[1:] & SOLID != 0)
    starts |= kind == 0
    return _contractions(codes, classes, starts, "sdmt", ("ll", "ve", "re"))


def gpt4_starts(codes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Does a piece of GPT4 begin at this character?     (n,), (n,) -> (n,) bool,     n ≥ 1.     An END counts as a piece, too.

    A sign that is neither letter nor number begins a piece where its run begins, unless a blank stands before it.
    A letter begins one where its run begins, unless it is led by white space (no newline) or by a single such sign that begins a piece.
    Numbers begin one at every third from where their run begins.
    White space: see _white_starts.
    """
    kind, before = classes & KIND, classes[:-1]
    changed = np.ones(len(classes), bool)
    changed[1:] = kind[1:] != kind[:-1]
    starts = changed.copy()
    starts[1:] &= (kind[1:] != OTHER) | (before & BLANK == 0)
    leads = (starts & (kind == OTHER)) | (classes & (WHITE | NEWLINE) == WHITE)
    starts[1:] &= (kind[1:] != LETTER) | ~leads[:-1]

    numbers = np.flatnonzero(kind == NUMBER)
    first = np.maximum.accumulate(np.where(changed[numbers], numbers, 0))
    starts[numbers[(numbers - first) % 3 == 0]] = True

    _white_starts(classes, kind, starts)
    starts |= kind == 0
    upper_and_lower = ("ll", "lL", "Ll", "LL", "ve", "vE", "Ve", "VE", "re", "rE", "Re", "RE")
    return _contractions(codes, classes, starts, "sdmtSDMT\u017f", upper_and_lower)   # ſ is a long s, which ignoring case is an s


def _white_starts(classes: np.ndarray, kind: np.ndarray, starts: np.ndarray) -> None:
    """Set `starts` right within white space, where so far it is True at the beginning of each run and nowhere else.

    Newlines right behind another sign belong to its piece (`[\\r\\n]*`). Of what is left of the run, up to its last newline is one piece
    (`\\s*[\\r\\n]+`); so are the characters behind that, but for the last one, which is left over to what follows (`\\s+(?!\\S)`). Where
    nothing follows, all is one piece (`\\s++$`). So within a run a piece begins at a stretch of white space without newlines
        - if the newlines before it belong to another sign, or
        - if it is the run's last stretch, and something follows: there, and at its last character.
    """
    newline = np.flatnonzero(classes & NEWLINE)
    plain = np.flatnonzero(classes & (WHITE | NEWLINE) == WHITE)
    newline_first, newline_last = _stretches(newline)
    taken = (newline_first > 0) & (kind[newline_first - 1] == OTHER)
    starts[newline_first[taken]] = False
    first, last = _stretches(plain)
    after = np.minimum(last + 1, len(kind) - 1)        # at the very end the last character itself, which is white: nothing follows
    final = kind[after] & SOLID != 0
    starts[first[final]] = True
    starts[last[final]] = True
    behind_taken = np.isin(first - 1, newline_last[taken], assume_unique=True)
    starts[first[behind_taken]] = True


def _stretches(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last of each stretch of consecutive positions.     [3 4 5 9] -> [3 9], [5 9]"""
    gaps = np.flatnonzero(positions[1:] != positions[:-1] + 1)
    edges = np.concatenate([[0], gaps + 1, [len(positions)]]) if len(positions) else np.zeros(1, int)
    return positions[edges[:-1]], positions[edges[1:] - 1]


def _contractions(codes: np.ndarray, classes: np.ndarray, starts: np.ndarray, single: str, double: tuple[str, ...]) -> np.ndarray:
    """An apostrophe that begins a piece and the letters of a contraction are a piece, and behind them begins another."""
    apostrophe = np.flatnonzero((classes & APOSTROPHE != 0) & starts)
    codes = np.append(codes, np.zeros(2, codes.dtype))
    first, second = codes[apostrophe + 1].astype(np.uint64), codes[apostrophe + 2]
    one = np.isin(first, [ord(c) for c in single])
    two = np.isin(first << 32 | second, [ord(a) << 32 | ord(b) for a, b in double])
    starts[apostrophe[one | two] + 1] = False
    for found, length in ((one, 2), (two, 3)):
        end = apostrophe[found] + length
        starts[end[end < len(starts)]] = True
    return starts


STARTS = {GPT2: gpt2_starts, GPT4: gpt4_starts}
