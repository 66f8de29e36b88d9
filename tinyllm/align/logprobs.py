"""How likely a model takes given answers to be: what every method of alignment compares.

Targets that count (see `Batch`) are the answer's tokens; those of the prompt and the padding are IGNORE.
"""

import numpy as np

from tinyllm import ops
from tinyllm.data import IGNORE, Batch
from tinyllm.nn import Transformer
from tinyllm.tensor import Tensor


def token_log_probabilities(model: Transformer, batch: Batch, rng: np.random.Generator | None = None) -> Tensor:
    """ln p(target) of each token given those before it; 0 where the target does not count.     -> (B, T)"""
    hidden = model.hidden(batch.ids, documents=batch.documents, rng=rng)
    return ops.linear_log_probabilities(hidden, model.output_weight, batch.targets, ignore_index=IGNORE)


def sequence_log_probabilities(model: Transformer, batch: Batch, rng: np.random.Generator | None = None) -> Tensor:
    """ln p(answer | prompt) = Σ ln p(token | what is before it), of each row.     -> (B,)"""
    return token_log_probabilities(model, batch, rng).sum(-1)


def padded(rows: list[list[int]], counted: list[int], width: int | None = None) -> Batch:
    """Ragged rows as a Batch: the last counted[b] tokens of row b are its answer, whose targets count.     -> (B, T)

    Padding is on the right, where causal attention lets no real token see it; its id is 0. A row's last token is among the ids, too
    (its own target is IGNORE): a reward is read from there.     width : T, by default the longest row's length.
    """
    width = width or max(map(len, rows))
    ids, targets = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), IGNORE, np.int64)
    for b, (row, count) in enumerate(zip(rows, counted, strict=True)):
        ids[b, : len(row)] = row
        targets[b, len(row) - 1 - count : len(row) - 1] = row[len(row) - count :]
    return Batch(ids, targets)
