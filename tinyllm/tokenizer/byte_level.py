"""Byte-level BPE: any text or bytes -> ids, nothing unknown, nothing lost.

Cut the text into pieces (patterns.py), take each piece's UTF-8 bytes, merge them (bpe.py). Ids 0 to 255 are the bytes, 256 + i is merge
i, special tokens come last. Text repeats itself, so a dictionary of pieces seen before answers for almost every piece.

So is short text encoded, and text cut by a pattern of one's own. Long text, and what is learned from, is worked on by array operations
over many pieces at once (bulk.py, with figures), several times faster; the ids are the same.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from tinyllm.tokenizer.base import END_OF_TEXT, VERSION, Tokenizer, check_special, check_texts, special_pattern
from tinyllm.tokenizer.bpe import Pair, encode_heap
from tinyllm.tokenizer.bulk import Block, BulkEncoder, count_bulk, waves
from tinyllm.tokenizer.learn import train_incremental
from tinyllm.tokenizer.patterns import GPT4, Splitter
from tinyllm.tokenizer.starts import STARTS

LONG_TEXT = 1 << 13         # characters: from here on array operations are faster than going piece by piece
REMEMBERED_IDS = 1 << 20    # ids of pieces that an encoder may remember before a new one takes its place: some 100 MB
CACHED_PIECES = 1 << 18     # remember at most so many pieces,
CACHED_LENGTH = 100         # of at most so many bytes: tens of megabytes
UNDECODABLE = re.compile("([\udc80-\udcff]+)")      # what "surrogateescape" makes of bytes that are not UTF-8


class BPETokenizer(Tokenizer):
    """Byte-level BPE tokenizer. Lossless on every str and, with encode_bytes and decode_bytes, on every bytes.

    A lone surrogate in a str (half of a UTF-16 pair: not a character, but Python allows it) becomes the three bytes that UTF-8's scheme
    gives its number; decode(ids, errors="surrogatepass") returns it, plain decode shows U+FFFD for it.
    """

    kind = "bpe"

    def __init__(self, merges: Iterable[Sequence[int]], pattern: str = GPT4, special_tokens: Iterable[str] = (END_OF_TEXT,)):
        """merges: pairs of ids in the order learned. pattern: a name or regular expression (see Splitter). ValueError for bad ones."""
        tokens = [bytes([byte]) for byte in range(256)]
        self._ranks: dict[Pair, int] = {}
        for i, merged in enumerate(merges):
            pair = tuple(merged)
            if len(pair) != 2 or not all(type(token) is int and 0 <= token < len(tokens) for token in pair):
                raise ValueError(f"merge {i} must be two ids from 0 to {len(tokens) - 1}, which exist before it, got {list(pair)!r}")
            if pair in self._ranks:
                raise ValueError(f"merge {i} repeats merge {self._ranks[pair] - 256}: both join ids {pair[0]} and {pair[1]}")
            self._ranks[pair] = len(tokens)
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
        super().__init__(tokens, special_tokens)
        self.split = Splitter(pattern)
        self._cache: dict[str, list[int]] = {}
        self._encoders: list[BulkEncoder] = []

    @property
    def merges(self) -> list[Pair]:
        """Pairs of ids in the order learned; merge i makes id 256 + i."""
        return list(self._ranks)

    @property
    def ranks(self) -> dict[Pair, int]:
        """Pair of ids -> id of the token that it becomes."""
        return dict(self._ranks)

    @property
    def pattern(self) -> str:
        """The regular expression that cuts text into pieces."""
        return self.split.pattern

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of text, special tokens taken as ordinary text."""
        if len(text) >= LONG_TEXT and self.pattern in STARTS:
            return next(self.encode_ordinary_batch([text])).tolist()
        ids: list[int] = []
        cached = self._cache.get
        for piece in self.split(text):
            ids += cached(piece) or self._encode_piece(piece)
        return ids

    def encode_ordinary_batch(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of encode_ordinary of each text in order, as arrays; texts are taken as they are needed.     (n,) uint32 each

        The fast way for many texts or long ones, on all threads (see tinyllm.threads). A pattern of one's own goes text by text.
        """
        if self.pattern not in STARTS:
            yield from super().encode_ordinary_batch(texts)
            return
        ids: list[np.ndarray] = []
        for wave in waves(check_texts(texts)):
            for block, parts in zip(wave, self._encode_wave(wave), strict=True):
                for (_, last), part in zip(block, parts, strict=True):
                    ids.append(part)
                    if last:
                        yield np.concatenate(ids)
                        ids = []

    def _encode_wave(self, wave: list[Block]) -> list[list[np.ndarray]]:
        """Whoever comes takes an encoder off the list and puts it back when all went well: so no two threads ever share one."""
        try:
            encoder = self._encoders.pop()
        except IndexError:
            encoder = BulkEncoder(self.pattern, self._ranks)
        ids = encoder.encode(wave)
        if encoder.size <= REMEMBERED_IDS:
            self._encoders.append(encoder)
        return ids

    def __getstate__(self) -> dict:
        """What a copy in another process needs: all but what was remembered."""
        return self.__dict__ | {"_cache": {}, "_encoders": []}

    def _encode_piece(self, piece: str) -> list[int]:
        data = piece.encode("utf-8", "surrogatepass")
        ids = encode_heap(data, self._ranks)
        if len(data) <= CACHED_LENGTH:
            if len(self._cache) >= CACHED_PIECES:
                self._cache.clear()
            self._cache[piece] = ids
        return ids

    def encode_bytes(self, data: bytes, allowed_special: Literal["all"] | Collection[str] = frozenset(),
                     disallowed_special: Literal["all"] | Collection[str] = "all") -> list[int]:
        """Ids of any bytes. Stretches of valid UTF-8 are encoded as text; each stretch of other bytes is a piece of its own."""
        ids: list[int] = []
        for i, part in enumerate(UNDECODABLE.split(data.decode("utf-8", "surrogateescape"))):
            if i % 2:
                ids += encode_heap(part.encode("utf-8", "surrogateescape"), self._ranks)
            else:
                ids += self.encode(part, allowed_special, disallowed_special)
        return ids

    def to_json(self) -> dict:
        """All that defines the tokenizer, as the file holds it."""
        return {"kind": self.kind, "version": VERSION, "pattern": self.pattern, "merges": [list(pair) for pair in self._ranks],
                "special_tokens": list(self.special_tokens)}

    @classmethod
    def from_json(cls, content: dict) -> "BPETokenizer":
        """The tokenizer that to_json described. ValueError when a field is missing or wrong."""
        merges, pattern, special_tokens = (content.get(field) for field in ("merges", "pattern", "special_tokens"))
        if not isinstance(merges, list) or not all(isinstance(pair, list) for pair in merges):
            raise ValueError('"merges" must be a list of pairs of ids')
        if not isinstance(pattern, str):
            raise ValueError('"pattern" must be a string')
        if not isinstance(special_tokens, list):
            raise ValueError('"special_tokens" must be a list of strings')
        return cls(merges, pattern, special_tokens)


def count_pieces(texts: Iterable[str], split: Splitter, special_tokens: Collection[str] = ()) -> dict[bytes, int]:
    """Distinct pieces of the texts and how often each occurs: all that training needs to keep. Special tokens are cut out."""
    if special_tokens:
        special = special_pattern(special_tokens)
        texts = (part for text in texts for part in special.split(text)[::2])
    if split.pattern in STARTS:
        return count_bulk(texts, split.pattern)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(text))
    return {piece.encode("utf-8", "surrogatepass"): count for piece, count in counts.items() if piece}


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = GPT4,
              special_tokens: Collection[str] = (END_OF_TEXT,), or_fewer: bool = False) -> BPETokenizer:
    """Learn a byte-level BPE tokenizer with exactly vocab_size ids: 256 bytes, merges, special tokens.

    texts is read once and never held, only its distinct pieces are. pattern: "gpt2", "gpt4" or a regular expression.
    or_fewer: a text that cannot give so many makes a smaller tokenizer, instead of being refused.
    Raises ValueError when vocab_size is too small to hold the bytes, or larger than these texts can give, and for bad special tokens.
    """
    check_texts(texts)
    special_tokens = check_special(special_tokens)  # before the long work
    reserved = 256 + len(special_tokens)
    if vocab_size < reserved:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need {reserved}")
    split = Splitter(pattern)
    merges = train_incremental(count_pieces(texts, split, special_tokens), vocab_size - reserved)
    if reserved + len(merges) < vocab_size and not or_fewer:
        raise ValueError(f"a vocabulary of {vocab_size} (--vocab-size) is more than this text can give: after {len(merges)} merges no pair is left; "
                         f"ask for at most {reserved + len(merges)}, or give more text")
    return BPETokenizer(merges, split.pattern, special_tokens)
