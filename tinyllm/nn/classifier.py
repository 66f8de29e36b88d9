"""A classifier: a language model's vectors of a text, made into one, and a linear map to a score for each class."""
import numpy as np

from tinyllm.backend import array_module
from tinyllm.config import suggestion
from tinyllm.nn.layers import Linear
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor

PADDING = -1  # the number of the document that padding makes up: no text has it


def _last(hidden: Tensor, lengths: np.ndarray) -> Tensor:
    return hidden[array_module(hidden.data).arange(len(lengths)), array_module(hidden.data).asarray(lengths - 1)]


def _first(hidden: Tensor, lengths: np.ndarray) -> Tensor:
    return hidden[:, 0]


def _mean(hidden: Tensor, lengths: np.ndarray) -> Tensor:
    share = (inside(hidden.shape[1], lengths) / lengths[:, None]).astype(hidden.dtype)
    return (hidden * array_module(hidden.data).asarray(share)[:, :, None]).sum(axis=1)


def inside(width: int, lengths: np.ndarray) -> np.ndarray:
    """True where a row is text, false where it is padding.     (B,) -> (B, width)"""
    return np.arange(width) < lengths[:, None]


POOLINGS = {"last": _last, "first": _first, "mean": _mean}  # (B, T, C), (B,) -> (B, C)


class Classifier(Module):
    """Scores of K classes for each text.     (B, T) int, (B,) int -> (B, K)

        z = pooled(hidden(ids))·Wᵀ + b          pooled: the last, the first, or the mean of the vectors of the text's own tokens

    In a decoder only the last token has seen the whole text, and the first has seen nothing but itself: "first" is for encoders.
    The head starts at 0: all classes are equally likely, whatever the model says.

    model : a Transformer or an Encoder. Texts are padded on the right, which no real token of a decoder sees, and an encoder is told of.
    Raises ValueError for fewer than two classes or an unknown pooling.
    """

    def __init__(self, model: Module, classes: int, *, pooling: str = "last"):
        if classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes to tell apart, got {classes}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown{suggestion(pooling, POOLINGS)}: it is one of {', '.join(POOLINGS)}")
        weight = model.embedding.weight
        self.model = model
        self.head = Linear(weight.shape[1], classes, rng=np.random.default_rng(0), std=0.0, dtype=weight.dtype).to(array_module(weight.data))
        self.pool = POOLINGS[pooling]

    def forward(self, ids: np.ndarray, lengths: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """lengths : tokens of each text; what comes after them is padding.     rng : given in training, draws dropout."""
        texts = None if self.model.causal else np.where(inside(ids.shape[1], lengths), 0, PADDING)
        return self.head(self.pool(self.model.hidden(ids, documents=texts, rng=rng), lengths))
