"""Texts for an encoder: documents cut into sentences, and what may stand in one row: two sentences, or as much text as fits.

A row's content is (parts, label): one or two arrays of ids, and whether the second part follows the first (see `SentencePairs`); None
where there is no second part.

On disk, in token shards, [SEP] stands behind each sentence, and once more behind the last one of a document.
"""
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from tinyllm.data.text import Document
from tinyllm.tokenizer import Tokenizer

IS_NEXT, IS_RANDOM = 0, 1  # labels of a pair, as BERT numbers them
FRAME = 3  # tokens around two sentences: [CLS] a [SEP] b [SEP]

Row = tuple[list[Sequence[int]], int | None]

# White space after the end of a sentence and what closes it, nothing at all after an ideographic one, and every new line.
SENTENCE_END = re.compile(r"""(?<=[.!?…])\s+|(?<=[.!?…]["'”’»)\]])\s+|(?<=[。！？])\s*|\s*\n\s*""")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by punctuation alone: "Mr. Fox" is cut in two.     "A cat. It eats." -> ["A cat.", "It eats."]"""
    return [sentence for part in SENTENCE_END.split(text) if (sentence := part.strip())]


def encode_sentences(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[list[np.ndarray]]:
    """The documents as lists of sentences, each the ids of its text; what says nothing is left out."""
    encoded = (list(tokenizer.encode_ordinary_batch(split_sentences(document.text))) for document in documents)
    return [kept for sentences in encoded if (kept := [ids for ids in sentences if len(ids)])]


def sentence_pieces(documents: Iterable[Document], tokenizer: Tokenizer, end_of_text: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """What `prepare` writes of each document that says anything: its sentences, each closed by [SEP], then [SEP]."""
    close = np.array([tokenizer.sep], np.uint32)
    for document in documents:
        for sentences in encode_sentences(tokenizer, [document]):
            yield np.concatenate([*(part for ids in sentences for part in (ids, close)), close]), len(document.text.encode())


def stored_sentences(tokens: np.ndarray, sep: int) -> list[list[np.ndarray]]:
    """The sentences of each document in such a shard, as parts of its array."""
    documents: list[list[np.ndarray]] = []
    start, begins = 0, True
    for end in np.flatnonzero(tokens == sep).tolist():
        if end > start:
            documents += [[]] if begins else []
            documents[-1].append(tokens[start:end])
        start, begins = end + 1, end == start
    return documents


class SentencePairs:
    """Pairs of sentences for next-sentence prediction: one pair for each sentence that has a next one in its document.

        first     that sentence
        second    with probability ½ the next one (label IS_NEXT), else any sentence of any document (label IS_RANDOM), documents being
                  equally likely; by chance that can be the next one, which is why nobody tells all pairs right

    context : the tokens that a row holds. Of a pair that is too long, the longer sentence loses its end; on_cut gets one line that says how often.
    Raises ValueError where no document has two sentences, or a row has no room for a token of each.
    """

    def __init__(self, documents: Sequence[Sequence[Sequence[int]]], context: int, on_cut: Callable[[str], None] = warnings.warn):
        self.documents, self.room = documents, context - FRAME
        if self.room < 2:
            raise ValueError(f"two sentences need a context of at least {FRAME + 2} tokens, got {context}")
        nexts = [max(len(sentences) - 1, 0) for sentences in documents]
        self.document = np.repeat(np.arange(len(documents)), nexts)  # of each pair's first sentence, and which of its sentences that is
        self.sentence = np.arange(len(self.document)) - np.repeat(np.cumsum(nexts) - nexts, nexts) if nexts else self.document
        if not len(self):
            raise ValueError(f"none of {len(documents)} documents has two sentences: there is no next sentence to predict; give longer texts")
        long = sum(len(a) + len(b) > self.room for sentences in documents for a, b in zip(sentences, sentences[1:], strict=False))
        if long:
            on_cut(f"{long} of {len(self)} pairs of sentences are longer than a row of {context} tokens: the longer sentence loses its end")

    def __len__(self) -> int:
        return len(self.document)

    def rows(self, numbers: Iterable[int], random: np.random.Generator) -> list[Row]:
        """The pairs with these numbers, their second sentences drawn."""
        return [self._pair(self.documents[self.document[n]], self.sentence[n], random) for n in numbers]

    def _pair(self, sentences, place, random) -> Row:
        label, second = (IS_NEXT, sentences[place + 1]) if random.random() < 0.5 else (IS_RANDOM, self._any(random))
        first = sentences[place]
        kept = min(len(first), max(self.room - len(second), -(-self.room // 2)))
        return [first[:kept], second[: self.room - kept]], label

    def _any(self, random):
        sentences = self.documents[random.integers(len(self.documents))]
        return sentences[random.integers(len(sentences))]


class Passages:
    """Rows of one part each, for the masked language model alone: documents cut into pieces of at most `context` tokens, frame included.

    Raises ValueError where there is no text, or no room for a token between [CLS] and [SEP].
    """

    def __init__(self, documents: Iterable[Sequence[int]], context: int):
        room = context - 2
        if room < 1:
            raise ValueError(f"a text needs a context of at least 3 tokens, got {context}")
        self.pieces = [ids[start : start + room] for ids in documents for start in range(0, len(ids), room)]
        if not self.pieces:
            raise ValueError("there is no text: all documents are empty")

    def __len__(self) -> int:
        return len(self.pieces)

    def rows(self, numbers: Iterable[int], random: np.random.Generator) -> list[Row]:
        """The pieces with these numbers. Nothing about them is drawn."""
        return [([self.pieces[n]], None) for n in numbers]
