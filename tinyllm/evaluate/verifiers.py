"""Is a free answer right? Functions of what was written and what was expected."""
import re
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_match(written: str, expected: str) -> bool:
    """The same text, but for letters' case, the amount of white space, and a full stop at the end."""
    return _plain(written) == _plain(expected)


def last_number(written: str, expected: str) -> bool:
    """The last number in both has the same value: "…, so 1,234.0 in all." answers "#### 1234"."""
    found, wanted = number_in(written), number_in(expected)
    if wanted is None:
        raise ValueError(f"the expected answer {expected!r} has no number in it: verify it by exact_match")
    return found == wanted


def contains(written: str, expected: str) -> bool:
    """The expected words occur in what was written, as whole words."""
    return re.search(rf"(?<!\w){re.escape(_plain(expected))}(?!\w)", _plain(written)) is not None


def number_in(text: str) -> Decimal | None:
    """The last number in a text, exactly: 0.1 is not a binary fraction. A minus right after a digit or letter is a dash. None without one."""
    found = None
    for match in NUMBER.finditer(text):
        spelled = match[0]
        if spelled.startswith("-") and match.start() and text[match.start() - 1].isalnum():
            spelled = spelled[1:]
        try:
            found = Decimal(spelled.replace(",", ""))
        except InvalidOperation:  # digits of another script, which are no part of ASCII's numbers
            continue
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
