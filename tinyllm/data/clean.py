"""Cleaning rules, each of which says what it did: how often, to how many documents, and to which, for example.

    edits     change a text: line ends, Unicode's form, invisible characters, boilerplate lines, private data
    limits    drop a document whose measure (see measures.py) lies outside its bounds

A document goes through the edits in the order of EDITS, then through the limits, and the first that it breaks drops it. None of them
knows a language. After Raffel et al. 2020 (C4) and Rae et al. 2021 (Gopher, table A1), as far as these do without one.
"""
import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields

from tinyllm.config import check, setting
from tinyllm.data.lines import LineCounts
from tinyllm.data.measures import measures
from tinyllm.data.text import Document

EXCERPT = 160  # characters of a document shown as an example


@dataclass(frozen=True)
class CleanConfig:
    """Which edits are made, and what is dropped. A limit is called min_ or max_ and the name of its measure."""

    unicode: bool = setting(True, "bring characters that can be written in two ways into one (Unicode NFC)")
    control: bool = setting(True, "line ends become \\n; remove control characters and invisible ones, such as zero-width spaces")
    boilerplate: int = setting(100, "remove lines of 20 and more characters that stand in at least so many documents; 0: none", minimum=0)
    email: bool = setting(True, "put [email] for e-mail addresses")
    phone: bool = setting(True, "put [phone] for phone numbers that are written as such")
    ip: bool = setting(True, "put [ip] for IP addresses")
    min_characters: int = setting(30, "drop shorter documents", minimum=0)
    max_characters: int = setting(10_000_000, "drop longer documents", minimum=0)
    min_letters: float = setting(0.4, "share of letters, white space not counted", minimum=0, maximum=1)
    max_digits: float = setting(0.5, "share of digits", minimum=0, maximum=1)
    max_signs: float = setting(0.4, "share of punctuation and symbols", minimum=0, maximum=1)
    min_word_length: float = setting(1, "mean characters of a word", minimum=0)
    max_word_length: float = setting(20, "mean characters of a word", minimum=0)
    min_unique_words: float = setting(0.1, "different words as a share of the first thousand", minimum=0, maximum=1)
    max_repeated_signs: float = setting(0.2, "share of characters that repeat the three before", minimum=0, maximum=1)
    max_repeated_lines: float = setting(0.5, "share of characters in lines that stood in the document before", minimum=0, maximum=1)
    examples: int = setting(5, "of each rule, for the report", minimum=0)

    def __post_init__(self):
        check(self)


# ---- edits: text -> (text, number of places changed) ----

INVISIBLE = re.compile("\r\n?|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")  # joiners stay: emoji and Persian need them
EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
PHONE = re.compile(
    r"(?<![\w+.])(?:\+\d(?:[ /()-]{0,2}\d){6,14}"  # +44 20 7946 0018
    r"|\(\d{2,5}\)(?:[ ./-]?\d){5,10}"  # (020) 7946 0018
    r"|\d{3}([-. ])\d{3}\1\d{4})(?![\w-]|\.\d)"  # 202-555-0143
)
IP = re.compile(r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}|(?=[a-fA-F:]*\d)[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7})(?![\w:]|\.\d)")


def to_nfc(text: str) -> tuple[str, int]:
    """Unicode's composed form: é as one character, not as e and an accent. Counts 1 for a text that was not in it."""
    normal = unicodedata.normalize("NFC", text)
    return normal, int(normal != text)


def without_control(text: str) -> tuple[str, int]:
    """Line ends as \\n, and no character that is neither seen nor needed. A tab stays."""
    return INVISIBLE.subn(lambda match: "\n" if match[0][0] == "\r" else "", text)


def mask_email(text: str) -> tuple[str, int]:
    """someone@example.org -> [email]"""
    return EMAIL.subn("[email]", text) if "@" in text else (text, 0)


def mask_phone(text: str) -> tuple[str, int]:
    """Numbers with a leading + and without a point, an area code in brackets, or grouped as 3-3-4. Others may be anything, such as a date, and stay."""
    return PHONE.subn("[phone]", text)


def mask_ip(text: str) -> tuple[str, int]:
    """IPv4 and IPv6 addresses. What only looks like one, such as 300.1.1.1 or 12:30:45, stays; ::1 and version 1.2.3.4 do not."""
    count = 0

    def mask(match):
        nonlocal count
        try:
            ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        count += 1
        return "[ip]"

    return IP.sub(mask, text), count


EDITS: dict[str, Callable] = {
    "boilerplate": LineCounts.remove,  # first: lines were counted as they came
    "unicode": to_nfc,
    "control": without_control,
    "email": mask_email,
    "ip": mask_ip,
    "phone": mask_phone,
}


# ---- all of them ----


@dataclass
class Tally:
    """What one rule did. For an edit, `places` counts the changes; for a limit, `characters` those of the documents that it dropped."""

    documents: int = 0
    places: int = 0
    characters: int = 0
    examples: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Dropped:
    """A document that is not kept: which rule it broke, and its measure."""

    document: Document
    rule: str
    found: float


def broken_limit(text: str, config: CleanConfig) -> tuple[str, float] | None:
    """The first limit that the text breaks, with what was measured; None if it keeps all. A bound itself is within the limit."""
    for name, value in measures(text).items():
        if value < getattr(config, f"min_{name}", value):
            return f"min_{name}", value
        if value > getattr(config, f"max_{name}", value):
            return f"max_{name}", value
    return None


class Cleaner:
    """The rules at work. `lines` are those of all documents, counted before, which the rule `boilerplate` needs."""

    def __init__(self, config: CleanConfig, lines: LineCounts | None = None):
        if config.boilerplate and lines is None:
            raise ValueError("the rule boilerplate needs the LineCounts of all documents; without them, set boilerplate to 0")
        self.config, self.lines = config, lines
        self.edits = [name for name in EDITS if getattr(config, name)]
        limits = [f.name for f in fields(config) if f.name.startswith(("min_", "max_"))]
        self.tallies = {name: Tally() for name in self.edits + limits}

    def clean(self, document: Document) -> Document | Dropped:
        """The document after all edits, or why it is dropped."""
        text = document.text
        for name in self.edits:
            after, places = self.lines.remove(text, self.config.boilerplate) if name == "boilerplate" else EDITS[name](text)
            if places:
                self._remember(name, len(text) - len(after), places, lambda t=text, a=after: _change(t, a), document.source)
                text = after
        if broken := broken_limit(text, self.config):
            name, value = broken
            self._remember(name, len(text), 0, lambda: {"found": round(value, 4), "text": _shown(text)}, document.source)
            return Dropped(document, name, value)
        return Document(text, document.source)

    def _remember(self, name, characters, places, example, source) -> None:
        tally = self.tallies[name]
        tally.documents += 1
        tally.places += places
        tally.characters += characters
        if len(tally.examples) < self.config.examples:
            tally.examples.append({"source": source, **example()})


def clean(documents: Iterable[Document], config: CleanConfig) -> tuple[Iterator[Document | Dropped], dict[str, Tally]]:
    """All documents cleaned, one at a time, and the tallies, which fill as the first is read.

    `documents` are read twice where boilerplate is looked for, so they must be a list, or something else that begins anew each time.
    """
    lines = None
    if config.boilerplate:
        if iter(documents) is iter(documents):
            raise ValueError("documents are read twice to find boilerplate lines: give a list, or set boilerplate to 0")
        lines = LineCounts()
        for document in documents:
            lines.add(document.text)
    cleaner = Cleaner(config, lines)
    return map(cleaner.clean, documents), cleaner.tallies


def _shown(text: str) -> str:
    return text[:EXCERPT] + "…" * (len(text) > EXCERPT)


def _change(before: str, after: str) -> dict[str, str]:
    """Both texts from shortly before the first place in which they differ."""
    low, high = 0, min(len(before), len(after))
    while low < high:  # the longest common start, by halving
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before.startswith(after[:middle]) else (low, middle - 1)
    start = max(0, low - EXCERPT // 4)
    return {"before": "…" * (start > 0) + _shown(before[start:]), "after": "…" * (start > 0) + _shown(after[start:])}
