"""One id a character: the smallest vocabulary that is still a tokenizer. Good for a first model on a small text."""

from collections.abc import Collection, Iterable
from typing import Literal

from tinyllm.tokenizer.base import VERSION, Tokenizer


class CharTokenizer(Tokenizer):
    """The characters of a text, sorted by code point, are the ids 0, 1, 2 … There are no special tokens and nothing else can be encoded."""

    kind = "char"

    def __init__(self, characters: Iterable[str]):
        """characters: each once, sorted. ValueError otherwise."""
        self.characters = list(characters)
        if not self.characters or any(not isinstance(c, str) or len(c) != 1 for c in self.characters):
            raise ValueError("the vocabulary must be a list of at least one character, each a string of length 1")
        if any(a >= b for a, b in zip(self.characters, self.characters[1:], strict=False)):
            raise ValueError("the vocabulary's characters must be distinct and sorted by code point")
        super().__init__(c.encode("utf-8", "surrogatepass") for c in self.characters)
        self._ids = {c: i for i, c in enumerate(self.characters)}

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The tokenizer of every character that occurs in texts. ValueError when there is none."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        if not seen:
            raise ValueError("cannot make a character tokenizer of an empty text")
        return cls(sorted(seen))

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of text. ValueError names the first character that is not in the vocabulary."""
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            c = error.args[0]
            raise ValueError(
                f"character {c!r} (U+{ord(c):04X}) at position {text.index(c)} is not among the {self.vocab_size} characters of this "
                "tokenizer: train it on text that has it, or use a byte-level BPE tokenizer, which can encode any text") from None

    def encode_bytes(self, data: bytes, allowed_special: Literal["all"] | Collection[str] = frozenset(),
                     disallowed_special: Literal["all"] | Collection[str] = "all") -> list[int]:
        """Ids of UTF-8 text. Other bytes are no characters: UnicodeDecodeError, which is a ValueError, says where."""
        return self.encode(data.decode("utf-8"), allowed_special, disallowed_special)

    def to_json(self) -> dict:
        """All that defines the tokenizer, as the file holds it. A list: in one string two surrogate halves would fuse."""
        return {"kind": self.kind, "version": VERSION, "characters": self.characters}

    @classmethod
    def from_json(cls, content: dict) -> "CharTokenizer":
        """The tokenizer that to_json described. ValueError when a field is missing or wrong."""
        if not isinstance(content.get("characters"), list):
            raise ValueError('"characters" must be a list of characters')
        return cls(content["characters"])
