"""What every tokenizer does, whatever its tokens are: special tokens, decoding, saving, a fingerprint."""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np

END_OF_TEXT = "<|endoftext|>"
VERSION = 1


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the tokens, the longest where one begins another. One group, so that re.split keeps what it found."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def check_special(names: Iterable[str]) -> list[str]:
    """The names of special tokens as a list. ValueError unless they are non-empty, distinct strings."""
    names = list(names)
    if any(not isinstance(name, str) or not name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"special tokens must be non-empty, distinct strings, got {names!r}")
    return names


def check_texts(texts: Iterable[str]) -> Iterable[str]:
    """The texts. ValueError for one string, which would pass for a list of its characters."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list or iterator of texts, got one string: write [text]")
    return texts


class Tokenizer(ABC):
    """Base of BPETokenizer, CharTokenizer and WordPieceTokenizer. A kind of tokenizer supplies `encode_ordinary`, `encode_bytes` and `to_json`.

    Ids 0 … are the ordinary tokens, special tokens come last. special_tokens: {text: id}.
    """

    kind: str

    def __init__(self, tokens: Iterable[bytes], special_tokens: Iterable[str] = ()):
        names = check_special(special_tokens)
        table = dict(enumerate(tokens))
        self.special_tokens = {name: len(table) + i for i, name in enumerate(names)}
        self._bytes = table | {token: name.encode("utf-8", "surrogatepass") for name, token in self.special_tokens.items()}

    # ---- text -> ids ----

    def encode(self, text: str, allowed_special: Literal["all"] | Collection[str] = frozenset(),
               disallowed_special: Literal["all"] | Collection[str] = "all") -> list[int]:
        """Ids of text. A special token written in the text is an error unless you say what it means there (tiktoken's rule).

        allowed_special: special tokens that become their one id; "all" or a collection.
        disallowed_special: strings whose presence raises ValueError; "all" means every special token that is not allowed.
        A special token in neither is encoded as the ordinary text it is made of.
        So text from a stranger can never smuggle in a special token: by default it is refused, with () it is harmless.
        """
        ids: list[int] = []
        for i, part in enumerate(self._parts(text, allowed_special, disallowed_special)):
            ids += [self.special_tokens[part]] if i % 2 else self.encode_ordinary(part)
        return ids

    def encode_to_numpy(self, text: str, allowed_special: Literal["all"] | Collection[str] = frozenset(),
                        disallowed_special: Literal["all"] | Collection[str] = "all") -> np.ndarray:
        """The ids of encode as an array: faster for long text, and a tenth of the memory.     (n,) uint32"""
        parts = self._parts(text, allowed_special, disallowed_special)
        special = (np.array([self.special_tokens[name]], np.uint32) for name in parts[1::2])
        arrays = zip_longest(self.encode_ordinary_batch(parts[::2]), special, fillvalue=np.zeros(0, np.uint32))
        return np.concatenate([array for pair in arrays for array in pair])

    def _parts(self, text: str, allowed_special: Literal["all"] | Collection[str],
               disallowed_special: Literal["all"] | Collection[str]) -> list[str]:
        """Ordinary text and allowed special tokens in turn. ValueError as in encode."""
        allowed = self._chosen(allowed_special, "allowed_special")
        if unknown := allowed - set(self.special_tokens):
            known = ", ".join(self.special_tokens) or "none"
            raise ValueError(f"allowed_special names {min(unknown)!r}, which this tokenizer does not have; it has: {known}")
        disallowed = self._chosen(disallowed_special, "disallowed_special")
        if disallowed_special == "all":
            disallowed -= allowed
        if disallowed and (found := special_pattern(disallowed).search(text)):
            raise ValueError(
                f"the text contains the special token {found[0]!r} at position {found.start()}: pass allowed_special={{{found[0]!r}}} "
                "to encode it as that token, or disallowed_special=() to encode it as ordinary text")
        return special_pattern(allowed).split(text) if allowed else [text]

    def _chosen(self, choice: Literal["all"] | Collection[str], argument: str) -> set[str]:
        if choice == "all":
            return set(self.special_tokens)
        if isinstance(choice, str):
            raise ValueError(f'{argument} must be "all" or a collection of strings, got the string {choice!r}: write {{{choice!r}}}')
        return set(choice)

    @abstractmethod
    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of text, special tokens taken as ordinary text."""

    def encode_ordinary_batch(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of encode_ordinary of each text in order, as arrays; texts are taken as they are needed.     (n,) uint32 each"""
        for text in check_texts(texts):
            yield np.array(self.encode_ordinary(text), np.uint32)

    # ---- ids -> text ----

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes that the ids stand for."""
        try:
            return b"".join(map(self._bytes.__getitem__, ids))
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in this tokenizer: its ids are 0 to {self.vocab_size - 1}") from None

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text. Ids may end inside a character: errors, as in bytes.decode, says what then ("replace" shows U+FFFD)."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token."""
        return self.decode_bytes((token,))

    # ---- what it is ----

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes)

    @property
    def end_of_text(self) -> int | None:
        """Id of <|endoftext|>, which stands between documents; None if there is no such token."""
        return self.special_tokens.get(END_OF_TEXT)

    @abstractmethod
    def to_json(self) -> dict:
        """All that defines the tokenizer, as the file holds it."""

    def _canonical(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON: two tokenizers with the same fingerprint give the same ids."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the JSON file. Whatever fails, a file that was there before stays whole: the new one takes its place in one step."""
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot save the tokenizer as {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise IsADirectoryError(f"cannot save the tokenizer as {path}: that is a folder; name a file in it")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(self._canonical() + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
