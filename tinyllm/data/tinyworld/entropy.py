"""How far a model is from the best that any model could do.

On texts drawn from a distribution p, a model q loses on average E[-ln q] = H + KL(p ‖ q) ≥ H nats a text. H is known exactly:
World.entropy(kind). On a given set of held-out texts the best model loses their mean -ln p, which differs from H by chance only; it is
the fairer mark for a loss that was measured on these very texts, because the model met the same luck.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from tinyllm.data.tinyworld.items import Item
from tinyllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Surprise:
    """Mean -ln p in nats per text, its standard error as an estimate of the entropy, and of how many texts."""

    nats: float
    standard_error: float
    count: int


def surprise(items: Sequence[Item]) -> Surprise:
    """Mean -ln p of texts, under the world that wrote them: the Monte Carlo estimate of the entropy. ValueError for none."""
    nats = -np.array([item.log_probability for item in items])
    if not len(nats):
        raise ValueError("there are no texts to take the mean of")
    return Surprise(float(nats.mean()), float(nats.std() / sqrt(len(nats))), len(nats))


def nats_per_token(items: Sequence[Item], tokenizer: Tokenizer) -> float:
    """The loss of the best possible model on these texts, in nats per token: Σ -ln p / Σ tokens.

    Counted are a text's tokens and, where the tokenizer has one, the end-of-text token behind it, as in training. That token costs the
    best model nothing (a text shows where it ends), and neither does the choice between spellings in tokens, since the tokenizer
    always makes the same one.
    """
    ending = 0 if tokenizer.end_of_text is None else 1
    tokens = sum(len(ids) + ending for ids in tokenizer.encode_ordinary_batch(item.text for item in items))
    return -sum(item.log_probability for item in items) / tokens
