"""Pretraining an encoder: the losses of masked tokens and next sentences, and how often each is told right."""
from collections.abc import Iterable

import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module, to_numpy
from tinyllm.data import IGNORE, MaskedBatch
from tinyllm.nn import MaskedLanguageModel
from tinyllm.tensor import Tensor, no_grad


def mlm_loss(model: MaskedLanguageModel, batch: MaskedBatch, rng) -> Tensor:
    """Mean -ln p(token) over the masked places."""
    return _token_loss(model, _hidden(model, batch, rng), batch)


def nsp_loss(model: MaskedLanguageModel, batch: MaskedBatch, rng) -> Tensor:
    """Mean -ln p(label) over the pairs of sentences."""
    return _sentence_loss(model, _hidden(model, batch, rng), batch)


def mlm_nsp_loss(model: MaskedLanguageModel, batch: MaskedBatch, rng) -> Tensor:
    """The sum of both, from one forward."""
    hidden = _hidden(model, batch, rng)
    return _token_loss(model, hidden, batch) + _sentence_loss(model, hidden, batch)


OBJECTIVES = {"mlm": mlm_loss, "mlm+nsp": mlm_nsp_loss}


def masked_metrics(model: MaskedLanguageModel, batches: Iterable[MaskedBatch]) -> dict[str, float]:
    """mlm_accuracy: the share of the masked tokens that is told right; nsp_accuracy: of the pairs, as they were before tokens were masked.

    Of what the batches do not ask for, there is no figure.
    """
    told: dict[str, list[np.ndarray]] = {}
    with no_grad():
        for batch in batches:
            places, targets = _masked(batch)
            if len(places):
                masked = _at(model, _hidden(model, batch, None), places)
                told.setdefault("mlm_accuracy", []).append(to_numpy(masked.data.argmax(-1)) == targets)
            if batch.labels is not None:
                sentences = model.sentence_scores(_hidden(model, batch.restored(), None))
                told.setdefault("nsp_accuracy", []).append(to_numpy(sentences.data.argmax(-1)) == batch.labels)
    return {name: float(np.concatenate(right).mean()) for name, right in told.items()}


def _hidden(model, batch, rng) -> Tensor:
    documents = array_module(model.bias.data).asarray(batch.documents)
    return model.encoder.hidden(batch.ids, segments=batch.segments, documents=documents, rng=rng)


def _masked(batch) -> tuple[np.ndarray, np.ndarray]:
    """Where in the flat batch there is a target, and which.     -> (n,), (n,)"""
    targets = batch.targets.reshape(-1)
    places = np.flatnonzero(targets != IGNORE)
    return places, targets[places]


def _at(model, hidden, places) -> Tensor:
    """Token scores of these places alone: of six in seven none are asked for.     (B, T, C), (n,) -> (n, V)"""
    rows = ops.embedding(hidden.reshape(-1, hidden.shape[-1]), places)  # rows of a table by number, here of B·T vectors
    return model.token_scores(rows)


def _token_loss(model, hidden, batch) -> Tensor:
    """See MaskedBatch for why the divisor is not the number of targets."""
    places, targets = _masked(batch)
    if not len(places):  # as can be in a part of a batch
        return hidden.sum() * 0.0
    return ops.cross_entropy(_at(model, hidden, places), targets) * (len(places) / (len(batch) * batch.mean_targets))


def _sentence_loss(model, hidden, batch) -> Tensor:
    return ops.cross_entropy(model.sentence_scores(hidden), batch.labels)
