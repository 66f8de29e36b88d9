"""Classification: texts with labels -> batches, the loss, which parts of the model are learned, and predictions.

    texts = read_labelled("mails.csv")                                          names = label_names(texts)
    rows = encode_texts(tokenizer, [t.text for t in texts], context)            labels = [names.index(t.label) for t in texts]
    batches = LabelledBatches(rows, labels, batch=16, seed=0)
    model = Classifier(pretrained, len(names))                                  learn_top(model, blocks=1)
    train(model, lambda step: [batches.batch(step)], classification_loss, config)
    scores = predict(model, batches.in_order())                                 (N, K), for `metrics`
"""
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm import ops
from tinyllm.backend import to_numpy
from tinyllm.data.rows import padded, shuffled
from tinyllm.nn import Classifier, freeze, unfreeze
from tinyllm.tensor import Tensor, no_grad
from tinyllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class LabelledBatch:
    """Texts of one step: ids (B, T), padded on the right; lengths (B,) of the texts themselves; labels (B,), numbers from 0."""

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    @property
    def weight(self) -> int:
        """How many targets count: each text has one."""
        return len(self)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, number: int, count: int) -> "LabelledBatch":
        """The rows that are left to one of `count` workers."""
        rows = slice(len(self) * number // count, len(self) * (number + 1) // count)
        return LabelledBatch(self.ids[rows], self.lengths[rows], self.labels[rows])


class LabelledBatches:
    """Batches of texts with labels. Raises ValueError where there is none, or not a label for each."""

    def __init__(self, rows: Sequence[Sequence[int]], labels: Sequence[int], batch: int, seed: int):
        if not rows or len(rows) != len(labels) or batch < 1:
            raise ValueError(f"{len(rows)} texts with {len(labels)} labels in batches of {batch}: at least one each, and a label for every text")
        self.rows, self.labels, self.size, self.seed = rows, np.asarray(labels), batch, seed

    def batch(self, step: int) -> LabelledBatch:
        """The batch of a step, in random order without repetition (see `shuffled`)."""
        return self._of(shuffled(step, self.size, len(self.rows), self.seed))

    def in_order(self, every: int = 1) -> Iterator[LabelledBatch]:
        """Each text once; or of the batches each `every`-th. The last one may be smaller."""
        for start in range(0, len(self.rows), self.size * every):
            yield self._of(range(start, min(start + self.size, len(self.rows))))

    def _of(self, numbers: Iterable[int]) -> LabelledBatch:
        numbers = list(numbers)
        rows = [self.rows[i] for i in numbers]
        return LabelledBatch(padded(rows, fill=0), np.array([len(row) for row in rows]), self.labels[numbers])


def encode_texts(
    tokenizer: Tokenizer, texts: Iterable[str], context: int, on_cut: Callable[[str], None] = warnings.warn
) -> list[list[int]]:
    """The ids of each text, after <|endoftext|> where the tokenizer has it, as at the start of a document in pretraining.

    Of a text that is longer than the context only the beginning is read; on_cut gets one line that says of how many.
    """
    first = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    rows = [[*first, *tokenizer.encode_ordinary(text)] for text in texts]
    if long := sum(len(row) > context for row in rows):
        on_cut(f"{long} of {len(rows)} texts are longer than the model's context of {context} tokens: only their beginning is read")
    return [row[:context] for row in rows]


def classification_loss(model: Classifier, batch: LabelledBatch, rng) -> Tensor:
    """Mean -ln p(label) over the texts."""
    return ops.cross_entropy(model(batch.ids, batch.lengths, rng), batch.labels)


def learn_top(model: Classifier, blocks: int) -> None:
    """Learn the head and the uppermost blocks, with the norm above them; all below stays as it is.

    0 blocks: the head alone, on vectors that pretraining made. Without a call, or after unfreeze(model), everything is learned.
    Raises ValueError for more blocks than there are.
    """
    count = len(model.model.blocks)
    if not 0 <= blocks <= count:
        raise ValueError(f"the model has {count} blocks, of which {blocks} cannot be learned: choose 0 to {count}")
    freeze(model)
    top = [f"model.blocks.{i}" for i in range(count - blocks, count)]
    norm = ["model.norm"] if blocks and model.model.norm is not None else []
    unfreeze(model, "head", *top, *norm)


def predict(model: Classifier, batches: Iterable[LabelledBatch]) -> np.ndarray:
    """The scores of all texts; the largest of a row is the label that is guessed.     -> (N, K)"""
    with no_grad():
        return np.concatenate([to_numpy(model(batch.ids, batch.lengths).data) for batch in batches])
