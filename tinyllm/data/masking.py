"""Masked language modelling: rows of text with some tokens made unreadable, to be told from all the others.

    place        [CLS]  the   fox    lives  in     [SEP]
    chosen         -     -     x      -      x       -        15 % of all ordinary tokens
    ids          [CLS]  the  [MASK] lives  duck    [SEP]      of those chosen 80 % become [MASK], 10 % any token, 10 % stay
    targets        -     -    fox     -      in      -        what stood there, also where it still does

Were all chosen ones [MASK], the encoder would learn nothing about rows without one, which is all that it meets later; as it is, each token
may be wrong, and what it is must be told from the others. Source: Devlin et al. 2019, section 3.1 and appendix A.1.

Masks are drawn anew for every step, so that a text is masked differently each time (Liu et al. 2019, "RoBERTa").
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinyllm.backend import random_stream
from tinyllm.data.batches import IGNORE
from tinyllm.data.rows import padded, shuffled
from tinyllm.data.sentences import Passages, Row, SentencePairs
from tinyllm.tokenizer import Tokenizer

RATE = 0.15  # of ordinary tokens are chosen
MASKED, SUBSTITUTED = 0.8, 0.1  # of the chosen ones; the rest stays


def corrupt(ids: np.ndarray, special: np.ndarray, mask: int, random: np.random.Generator, rate: float = RATE) -> tuple[np.ndarray, np.ndarray]:
    """ids with some tokens made unreadable, and what stood there, IGNORE elsewhere.     (B, T), (V,) bool -> (B, T), (B, T)

    special : true for the ids that are no text: they are neither chosen nor put in another's place.
    """
    chosen = (random.random(ids.shape) < rate) & ~special[ids]
    kind = random.random(ids.shape)
    others = np.flatnonzero(~special)[random.integers(np.count_nonzero(~special), size=ids.shape)]
    unreadable = np.where(kind < MASKED, mask, np.where(kind < MASKED + SUBSTITUTED, others, ids))
    return np.where(chosen, unreadable, ids), np.where(chosen, ids, IGNORE)


@dataclass(frozen=True)
class MaskedBatch:
    """Corrupted rows, (B, T) each, and the labels of their second sentences, (B,).

    ids, targets : see `corrupt`.     segments : 0 in the first part of a row, 1 in the second.     documents : 0, and IGNORE in the padding.
    labels : IS_NEXT or IS_RANDOM; None where rows have one part.
    mean_targets : targets in a row, on average over the whole batch of which this may be a part.

    The loss has two means, one over targets and one over rows, and a mean over parts can have one weight only. So targets are averaged as

        Σ over targets / (rows · mean_targets)

    which is their mean in a whole batch, and in its parts, which keep the whole's number, gives that mean when averaged by rows.
    """

    ids: np.ndarray
    segments: np.ndarray
    documents: np.ndarray
    targets: np.ndarray
    labels: np.ndarray | None
    mean_targets: float

    @property
    def weight(self) -> int:
        """How many rows count: all. Losses of parts are averaged with these weights."""
        return len(self)

    def __len__(self) -> int:
        return len(self.ids)

    def restored(self) -> "MaskedBatch":
        """The same rows as they were, with all their tokens readable."""
        return replace(self, ids=np.where(self.targets == IGNORE, self.ids, self.targets))

    def part(self, number: int, count: int) -> "MaskedBatch":
        """One of `count` parts: neighbouring rows, as evenly shared out as can be. Processes get parts, and micro-batches are parts."""
        rows = slice(len(self) * number // count, len(self) * (number + 1) // count)
        labels = None if self.labels is None else self.labels[rows]
        return MaskedBatch(self.ids[rows], self.segments[rows], self.documents[rows], self.targets[rows], labels, self.mean_targets)


class MaskedBatches:
    """Batches of rows of text, framed, padded and corrupted.

    source : which rows there are: SentencePairs or Passages.     tokenizer : with the ids cls, sep, mask and pad.
    batch : rows of a step, all its micro-batches together: these are its parts.     rate : share of the ordinary tokens that is chosen.
    """

    def __init__(self, source: SentencePairs | Passages, tokenizer: Tokenizer, batch: int, seed: int, rate: float = RATE):
        if batch < 1:
            raise ValueError(f"a batch has at least 1 row, got {batch}")
        if not 0 < rate < 1:
            raise ValueError(f"the share of tokens to be masked lies between 0 and 1, got {rate}")
        self.source, self.tokenizer, self.size, self.seed, self.rate = source, tokenizer, batch, seed, rate
        self.special = np.isin(np.arange(tokenizer.vocab_size), list(tokenizer.special_tokens.values()))

    def batch(self, step: int) -> MaskedBatch:
        """The batch of a step, in random order without repetition (see `shuffled`). A pure function of (seed, step)."""
        return self._of(shuffled(step, self.size, len(self.source), self.seed), random_stream(self.seed, "masked rows", step))

    def in_order(self) -> Iterator[MaskedBatch]:
        """Each row of the source once, the same each time; all are parts of one whole, so that a mean over them is that of the whole."""
        whole = self._of(range(len(self.source)), random_stream(self.seed, "masked rows in order"))
        count = -(-len(whole) // self.size)
        return (whole.part(number, count) for number in range(count))

    def _of(self, numbers: Sequence[int], random: np.random.Generator) -> MaskedBatch:
        rows = self.source.rows(numbers, random)
        framed = [self._framed(parts) for parts, _ in rows]
        clean = padded([ids for ids, _ in framed], fill=self.tokenizer.pad)
        segments = padded([segments for _, segments in framed], fill=0)
        documents = padded([np.zeros_like(segments) for _, segments in framed], fill=IGNORE)
        ids, targets = corrupt(clean, self.special, self.tokenizer.mask, random, self.rate)
        mean = np.count_nonzero(targets != IGNORE) / len(rows)
        labels = np.array([label for _, label in rows]) if len(rows[0][0]) == 2 else None
        return MaskedBatch(ids, segments, documents, targets, labels, mean)

    def _framed(self, parts: Row) -> tuple[np.ndarray, np.ndarray]:
        """[CLS] first [SEP] second [SEP], and the segment of each token."""
        closed = [[*part, self.tokenizer.sep] for part in parts]
        ids = np.concatenate([[self.tokenizer.cls], *closed]).astype(np.int64)
        return ids, np.repeat(np.arange(len(parts)), [len(part) + (i == 0) for i, part in enumerate(closed)])
