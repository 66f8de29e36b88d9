"""A model whose every probability is known: the next token depends on the last one, by a table. For tests of what is built on models."""
from types import SimpleNamespace

import numpy as np

from tinyllm import ops
from tinyllm.tensor import Tensor


class ChainModel:
    """p(next | last) = table[last, next], each row adding up to 1.     (V, V)

    It keeps to what the package asks of a Transformer: hidden·output_weightᵀ are scores. passes counts calls, tokens what was read.
    """

    def __init__(self, table, context: int = 1000):
        self.table = np.asarray(table, dtype=np.float64)
        self.config = SimpleNamespace(context=context, unlimited=False)
        self.output_weight = Tensor(np.log(np.maximum(self.table, 1e-300)).T)
        self.calls, self.tokens = 0, 0

    def hidden(self, ids, *, cache=None, documents=None, rng=None):
        assert ids.shape[1] <= self.config.context
        self.calls, self.tokens = self.calls + 1, self.tokens + ids.size
        return Tensor(np.eye(len(self.table))[ids])

    def __call__(self, ids, **around):
        return ops.linear(self.hidden(ids, **around), self.output_weight)

    def next_scores(self, ids, cache):
        cache.length += ids.shape[1]
        return ops.linear(self.hidden(ids)[:, -1], self.output_weight)

    def new_cache(self, batch, capacity=None, left_padding=None):
        return SimpleNamespace(length=0, reorder=lambda rows: None)

    def log_p(self, ids) -> float:
        """ln p of all but the first."""
        return float(sum(np.log(self.table[a, b]) for a, b in zip(ids, ids[1:], strict=False)))


def random_table(size: int, seed: int = 0):
    """Rows of random probabilities."""
    table = np.random.default_rng(seed).random((size, size)) + 0.05
    return table / table.sum(1, keepdims=True)
