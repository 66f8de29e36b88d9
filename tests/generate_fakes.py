"""Stand-ins with a Transformer's interface for generation, whose continuations are known in advance."""
from types import SimpleNamespace

import numpy as np

from tinyllm.tensor import Tensor
from tinyllm.tokenizer import BPETokenizer


class Fake:
    """Scores of the next token from each row's own position and last token, by `scores(position, id) -> (V,)`."""

    def __init__(self, vocab_size, context=10**6):
        self.config = SimpleNamespace(vocab_size=vocab_size, context=context, unlimited=False)
        self.calls = []  # shape of each call's ids

    def hidden(self, ids, cache=None):
        self.calls.append(ids.shape)
        first = np.zeros(len(ids), dtype=int) if cache is None else cache.length - cache.left_padding
        if cache is not None:
            cache.length += ids.shape[1]
        return Tensor(np.array([[self.scores(first[b] + t, i) for t, i in enumerate(row)] for b, row in enumerate(ids)]))

    def __call__(self, ids):
        return self.hidden(ids)

    def next_scores(self, ids, cache):
        return self.hidden(ids, cache)[:, -1]

    def new_cache(self, batch, left_padding=None):
        return FakeCache(np.zeros(batch, dtype=int) if left_padding is None else left_padding)


class FakeCache:
    def __init__(self, left_padding):
        self.length, self.left_padding = 0, left_padding

    def reorder(self, rows):
        self.left_padding = self.left_padding[rows]


class Script(Fake):
    """Writes these ids one after the other, whatever the prompt of one token is; each has probability 1/(1 + (V - 1)·e^-20)."""

    def __init__(self, ids, vocab_size):
        super().__init__(vocab_size)
        self.ids = ids

    def scores(self, position, _):
        scores = np.zeros(self.config.vocab_size)
        scores[self.ids[min(position, len(self.ids) - 1)]] = 20.0
        return scores


class Bigram(Fake):
    """The next token's scores depend on the last token only: row `id` of a table."""

    def __init__(self, table, context=10**6):
        super().__init__(len(table), context)
        self.table = np.asarray(table, dtype=float)

    def scores(self, _, id):
        return self.table[id]


def byte_tokenizer(*merged: str) -> BPETokenizer:
    """256 bytes, one token for each of the given two-character strings, and <|endoftext|>."""
    return BPETokenizer([list(pair.encode()) for pair in merged], "gpt2", ["<|endoftext|>"])
