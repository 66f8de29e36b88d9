"""More tokens for a model that exists, such as those of a chat template."""
import dataclasses

import numpy as np

from tinyllm.backend import array_module
from tinyllm.nn.module import Parameter
from tinyllm.nn.transformer import Transformer

NOISE = 0.1  # of the old rows' standard deviation: enough to tell the new tokens apart, too little to leave the others' neighbourhood


def grow_vocabulary(model: Transformer, vocab_size: int, rng: np.random.Generator) -> None:
    """Give the model rows for the ids up to vocab_size, in its embedding and, where that is another, in its output weights.

        new row = mean of the old rows + NOISE·(their standard deviation, column by column)·N(0, 1)

    A new token's score is then about the mean score of the old ones, so the others' probabilities hardly change: with n new tokens by a
    factor of at least V/(V + n), were the noise 0 (e^mean ≤ mean of e^). Random small rows would have a score of about 0, which in a trained
    model can be far above the others.     Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".

    Make the optimizer afterwards. Raises ValueError where the model has more tokens than that already.
    """
    if vocab_size < model.config.vocab_size:
        raise ValueError(f"the model has {model.config.vocab_size} tokens, which cannot grow to {vocab_size}")
    for layer in (model.embedding, model.head):
        if layer is not None:
            _grow(layer.weight, vocab_size, rng)
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)


def _grow(weight: Parameter, count: int, rng: np.random.Generator) -> None:
    xp, old = array_module(weight.data), weight.data
    noise = xp.asarray(rng.standard_normal((count - len(old), old.shape[1])), dtype=old.dtype)
    weight.data = xp.concatenate([old, old.mean(0) + NOISE * old.std(0) * noise])
    weight.grad = weight.buffer = None
    weight.version.count += 1
