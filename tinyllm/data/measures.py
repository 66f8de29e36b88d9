"""What can be measured of a text without knowing its language: which kinds of characters it has, and how much it repeats itself.

Characters are looked up in a table of Unicode's general categories, all at once. Words are runs of letters, marks and digits; in
scripts that put no space between words, each letter or mark counts as one, because a whole sentence is none.
"""
import functools
import sys
import unicodedata

import numpy as np
import regex

LETTER, MARK, DIGIT, SIGN, SPACE, OTHER, UNSPACED = range(7)  # SIGN: punctuation and symbols; OTHER: control characters, unassigned …
KINDS = {"L": LETTER, "M": MARK, "N": DIGIT, "P": SIGN, "S": SIGN, "Z": SPACE, "C": OTHER}  # by a category's first letter
NO_SPACES = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&[\p{L}\p{M}]]"  # scripts without a space between words
WORD = regex.compile(rf"{NO_SPACES}|[\p{{L}}\p{{M}}\p{{N}}--{NO_SPACES}]+", regex.V1)
FIRST_WORDS = 1000  # the longer a text, the fewer of its words are new ones: of these alone `unique_words` tells


@functools.cache
def kinds() -> np.ndarray:
    """The kind of every character, by its code point.     (0x110000,) uint8"""
    characters = [chr(code) for code in range(sys.maxunicode + 1)]
    table = np.array([KINDS[unicodedata.category(character)[0]] for character in characters], np.uint8)
    table[[ord(space) for space in "\t\n\x0b\x0c\r"]] = SPACE  # Unicode calls them control characters
    table[[ord(character) for character in regex.findall(NO_SPACES, "".join(characters), regex.V1)]] = UNSPACED
    return table


def measures(text: str) -> dict[str, float]:
    """Each measure of a text, by name.

    characters        how many
    letters, digits, signs          shares of the characters that are no white space: letters and marks; digits; punctuation and symbols
    word_length       mean characters of a word; 0 where there is none
    unique_words      different words in the first thousand, as a share of these, without case
    repeated_signs    share of characters that are the same as each of the three before: "=====", "aaaaaa"
    repeated_lines    share of characters in lines that stood in the text before
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kind = kinds()[codes]
    count = np.bincount(kind, minlength=7)
    visible = max(1, len(text) - int(count[SPACE]))
    in_word = (kind <= DIGIT) | (kind == UNSPACED)
    begins = in_word & ((kind == UNSPACED) | ~np.append(False, in_word[:-1]) | np.append(False, kind[:-1] == UNSPACED))
    first = [word.lower() for word in _first_words(text)]
    return {
        "characters": len(text),
        "letters": float(count[LETTER] + count[MARK] + count[UNSPACED]) / visible,
        "digits": float(count[DIGIT]) / visible,
        "signs": float(count[SIGN]) / visible,
        "word_length": float(np.count_nonzero(in_word) / max(1, np.count_nonzero(begins))),
        "unique_words": len(set(first)) / max(1, len(first)),
        "repeated_signs": _repeated_signs(codes, kind) / visible,
        "repeated_lines": _repeated_lines(text),
    }


def _first_words(text: str) -> list[str]:
    found = []
    for match in WORD.finditer(text):
        found.append(match[0])
        if len(found) == FIRST_WORDS:
            break
    return found


def _repeated_signs(codes: np.ndarray, kind: np.ndarray) -> int:
    same = (codes[1:] == codes[:-1]) & (kind[1:] != SPACE)
    return int(np.count_nonzero(same[2:] & same[1:-1] & same[:-2]))


def _repeated_lines(text: str) -> float:
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0
