"""Tokens -> batches of windows (B, T). The batch of step n depends on (seed, n) alone, so a run resumes by asking for batch n.

A window is `context` + 1 neighbouring tokens: the first `context` are the inputs, the last `context` the targets, each input's target
being the token after it. Tokens may be memory-mapped; only the windows of the batch are read.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tinyllm.backend import random_stream

IGNORE = -1  # a target that is not to be predicted


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of one step, int64 (B, T).

    documents, where present, numbers the documents of each row, so that attention can be kept inside one: positions with the same
    number belong together. A number means nothing beyond its row.
    """

    ids: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None = None

    @property
    def weight(self) -> int:
        """How many targets count. Losses of several batches are averaged with these weights."""
        return int(np.count_nonzero(self.targets != IGNORE))

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, number: int, count: int) -> "Batch":
        """The rows that are left to one of `count` workers: neighbouring ones, as evenly shared out as can be."""
        rows = slice(len(self) * number // count, len(self) * (number + 1) // count)
        return Batch(self.ids[rows], self.targets[rows], None if self.documents is None else self.documents[rows])


class RandomWindows:
    """Windows that start at random places, all equally likely: some tokens are seen twice before others are seen at all.

    end_of_text: the id that separates documents; with it every batch carries document numbers.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch: int, seed: int, end_of_text: int | None = None):
        _check(tokens, context, batch)
        self.tokens, self.context, self.batch_size, self.seed, self.end_of_text = tokens, context, batch, seed, end_of_text

    def batch(self, n: int) -> Batch:
        starts = random_stream(self.seed, "windows", n).integers(len(self.tokens) - self.context, size=self.batch_size)
        return _gather(self.tokens, starts, self.context, self.end_of_text)


class Epochs:
    """Windows without repetition: an epoch cuts the tokens into windows whose inputs do not overlap and visits each once, in random order.

    Where the cuts lie is drawn anew for every epoch, so that no token is always the first of its window. Up to two windows' worth of
    tokens at the ends is left out of an epoch, another part of the text each time. A batch may begin in one epoch and end in the next.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch: int, seed: int, end_of_text: int | None = None):
        _check(tokens, context, batch)
        self.tokens, self.context, self.batch_size, self.seed, self.end_of_text = tokens, context, batch, seed, end_of_text
        self.windows = max(1, (len(tokens) - context) // context)  # as many as fit behind any phase, so that it is the same in all epochs

    def batch(self, n: int) -> Batch:
        places = np.arange(n * self.batch_size, (n + 1) * self.batch_size)
        spare = len(self.tokens) - 1 - self.windows * self.context
        starts = [_epoch_starts(self.seed, p // self.windows, self.windows, self.context, spare)[p % self.windows] for p in places.tolist()]
        return _gather(self.tokens, np.array(starts), self.context, self.end_of_text)


@lru_cache(maxsize=4)  # a batch needs one or two epochs; making the order again for every batch would cost time, not correctness
def _epoch_starts(seed: int, epoch: int, windows: int, context: int, spare: int) -> np.ndarray:
    random = random_stream(seed, "epoch", epoch)
    phase = random.integers(spare + 1)
    return phase + context * random.permutation(windows)


def validation_batches(tokens: np.ndarray, context: int, batch: int, end_of_text: int | None = None, every: int = 1) -> Iterator[Batch]:
    """One pass in order, in which every token but the very first is a target exactly once; or of its batches each `every`-th, read alone.

    The last batch may have fewer rows, and the last row is filled up with id 0 and target IGNORE.
    Errors: ValueError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"the validation part has {len(tokens)} tokens, at least 2 are needed: raise val_fraction or give more text")
    starts = np.arange(0, len(tokens) - 1, context)
    for first in range(0, len(starts), batch * every):
        yield _gather(tokens, starts[first : first + batch], context, end_of_text)


def _gather(tokens: np.ndarray, starts: np.ndarray, context: int, end_of_text: int | None) -> Batch:
    """The windows at `starts`; what lies past the last token is id 0 and target IGNORE."""
    places = starts[:, None] + np.arange(context + 1)  # (B, T+1)
    window = tokens[np.minimum(places, len(tokens) - 1)].astype(np.int64)
    inside = places < len(tokens)
    ids = np.where(inside, window, 0)[:, :-1]
    targets = np.where(inside, window, IGNORE)[:, 1:]
    return Batch(ids, targets, None if end_of_text is None else _number_documents(ids, end_of_text))


def _number_documents(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """(B, T) -> (B, T). end_of_text counts as the first token of the document after it: its target is that document's first token,
    which must not depend on the document before, and it is the prompt from which a new document is sampled."""
    return np.cumsum(ids == end_of_text, axis=1)


def _check(tokens: np.ndarray, context: int, batch: int) -> None:
    if context < 1 or batch < 1:
        raise ValueError(f"context and batch must be at least 1, found context {context} and batch {batch}")
    if len(tokens) < context + 1:
        remedy = f"give more text, or lower the context to at most {len(tokens) - 1}" if len(tokens) > 1 else "give more text"
        raise ValueError(f"the training part has {len(tokens)} tokens, but a window of context {context} needs {context + 1}: {remedy}")
