"""BERT's basic splitting: text -> words, before WordPiece looks at any of them.

    "Čau, wörld!\\u200b 東京"     ->     cau , world ! 東 京

    1. tidy    control characters, private ones and U+FFFD go; every kind of white space becomes a space; a Chinese character stands alone
    2. fold    (only with lower_case) é becomes e and an accent by Unicode's NFD, accents go, capitals become small letters
    3. apart   each punctuation sign stands alone
    4. words are what stands between spaces

Small letters are found character by character, as transformers' BertTokenizer does it: Σ becomes σ even where a word ends, which in
Greek would be ς. What a character is, Python's Unicode tables say; those of that package are of 2015, so that characters that came
later may be accents or punctuation here and letters there.
Source: Devlin et al. 2018, in the published code, tokenization.py.
"""

import unicodedata
from collections.abc import Callable

CHINESE = (  # ideographs; no kana, no hangul, which are written with spaces or in words of their own
    range(0x4E00, 0xA000), range(0x3400, 0x4DC0), range(0x20000, 0x2A6E0), range(0x2A700, 0x2B820), range(0x2B920, 0x2CEB0),
    range(0xF900, 0xFB00), range(0x2F800, 0x2FA20),
)  # fmt: skip
REMOVED = ("Cc", "Cf", "Co", "Cs")          # control, format and private characters, halves of surrogate pairs


def basic_split(text: str, lower_case: bool = True) -> list[str]:
    """The words of a text, none of them empty.     "Hello, world!" -> ["hello", ",", "world", "!"]

    lower_case : without it, capitals and accents stay.
    """
    text = text.translate(TIDY)
    if lower_case:
        text = unicodedata.normalize("NFD", text).translate(FOLD)
    return text.translate(APART).split()


def _tidy(c: str) -> str:
    if c in "\t\n\r" or c.isspace() and unicodedata.category(c) != "Cc":
        return " "
    if c == "\ufffd" or unicodedata.category(c) in REMOVED:
        return ""
    return f" {c} " if any(ord(c) in block for block in CHINESE) else c


def _fold(c: str) -> str:
    return "" if unicodedata.category(c) == "Mn" else c.lower()


def _apart(c: str) -> str:
    """Punctuation is also what ASCII has of symbols, such as $ and +."""
    sign = unicodedata.category(c)[0] == "P" or c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return f" {c} " if sign else c


class _Table(dict):
    """For str.translate: what a function makes of a character, asked once."""

    def __init__(self, rule: Callable[[str], str]):
        self.rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self.rule(chr(code))
        return self[code]


TIDY, FOLD, APART = map(_Table, (_tidy, _fold, _apart))
