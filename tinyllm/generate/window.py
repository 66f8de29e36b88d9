"""What the model sees while texts grow: a cache of keys and values, and what is done when a text outgrows the context."""
from collections.abc import Sequence

import numpy as np

from tinyllm.tensor import no_grad


def context_of(model) -> int | None:
    """The most tokens that the model can see, None where its attention slides and no text is too long."""
    return None if model.config.unlimited else model.config.context


def kept_context(context: int) -> int:
    """How many of its last tokens a text keeps when it has outgrown the context."""
    return max(1, context // 2)


class Window:
    """What the model sees of each text, with a cache of what it has read already.

    A text that outgrows the context loses its beginning: its newest half context remains and is read again, from position 0, since
    cached keys and values know the positions and the tokens that they were made with. Then there is room for another half. A row's
    window depends on that row's length alone. A model whose attention slides (config.unlimited) needs none of this.

    rolled : (B,) bool, texts whose beginning the model does not see any more.
    """

    def __init__(self, model, texts: Sequence[Sequence[int]]):
        self.model, self.size = model, context_of(model)
        self.texts = [list(text) if self.size is None else list(text)[-self.size :] for text in texts]
        self.rolled = np.array([len(seen) < len(text) for seen, text in zip(self.texts, texts, strict=True)])
        self.cache = None

    def logits(self):
        """Scores of each text's next token, in the model's precision.     -> (B, V)"""
        if self.cache is not None and self.cache.length == self.size:
            self._make_room()
        ids = [text[-1:] for text in self.texts] if self.cache is not None else self._padded()
        with no_grad():
            return self.model.next_scores(np.array(ids), self.cache).data

    def append(self, ids) -> None:
        """One more token for each text; the next `logits` reads them."""
        for text, token in zip(self.texts, ids, strict=True):
            text.append(int(token))

    def keep(self, rows) -> None:
        """Row b becomes what row rows[b] is now; there may be more rows or fewer than before."""
        self.texts = [list(self.texts[row]) for row in rows]
        self.rolled = self.rolled[rows]
        if self.cache is not None:
            self.cache.reorder(rows)

    def _padded(self):
        """All of each text, padded on the left so that they end together, and a new cache for them.     -> (B, T) int"""
        longest = max(map(len, self.texts))
        padding = np.array([longest - len(text) for text in self.texts])
        self.cache = self.model.new_cache(len(self.texts), left_padding=padding if padding.any() else None)
        return [[0] * n + text for n, text in zip(padding, self.texts, strict=True)]

    def _make_room(self):
        """Texts that are longer than the context keep their last half; all are read again, since they share a cache."""
        for row, text in enumerate(self.texts):
            if len(text) > self.size:
                self.texts[row] = text[-kept_context(self.size) :]
                self.rolled[row] = True
        self.cache = None
