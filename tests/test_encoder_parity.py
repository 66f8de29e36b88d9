"""The encoder and its heads against transformers' BERT and pre-norm RoBERTa, in float64: scores, loss, and every parameter's gradient.

The default test compares with numbers that golden/make_encoder.py recorded, the `peers` test with transformers as it is installed.
"""
from pathlib import Path

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.data import IGNORE, MaskedBatch
from tinyllm.nn import MaskedLanguageModel, TransformerConfig
from tinyllm.train import mlm_nsp_loss

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(arch="bert", vocab_size=13, layers=2, heads=2, width=8, mlp_width=12, context=9, norm_eps=1e-3)
MODELS = {"bert": {}, "roberta, pre-norm": dict(norm_placement="pre", layers=1)}


def model_of(name, **changes):
    """A model whose weights are large enough that attention is far from uniform."""
    random = np.random.RandomState(len(name))
    model = MaskedLanguageModel(TransformerConfig(**(TINY | MODELS[name] | changes)), random, np.float64)
    for parameter, p in model.named_parameters():
        p.data[...] = parameter.endswith("norm.weight") + (0.3 if p.data.ndim == 1 else 0.7) * random.standard_normal(p.shape)
    return model


def batch_of():
    """Two rows of two sentences, the second row with two places of padding."""
    random = np.random.RandomState(0)
    ids = random.randint(1, 13, (2, 8))
    targets = np.where(random.random((2, 8)) < 0.4, random.randint(0, 13, (2, 8)), IGNORE)
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]])
    documents = np.zeros((2, 8), int)
    ids[1, 6:], targets[1, 6:], documents[1, 6:] = 0, IGNORE, IGNORE
    return MaskedBatch(ids, segments, documents, targets, np.array([1, 0]), np.count_nonzero(targets != IGNORE) / 2)


def ours(name, **changes):
    """By tinyllm: the loss, the scores of both heads (without those of padding), and each parameter's gradient."""
    model, batch = model_of(name, **changes), batch_of()
    tokens, sentences = model(batch.ids, segments=batch.segments, documents=batch.documents)
    loss = mlm_nsp_loss(model, batch, None)
    loss.backward()
    real = batch.documents == 0
    return [loss.data, tokens.data[real], sentences.data, *(p.grad for _, p in model.named_parameters())]


def compare(found, expected):
    """Each array to 1e-9 of its largest element; what is zero by nature (a key's bias shifts all scores alike) to 1e-14."""
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-14, 1e-9 * np.abs(b).max()))


def recorded(name):
    """What make_encoder.py recorded, in the order of `ours`."""
    flat, arrays = np.load(GOLDEN / "encoder.npz")[name], []
    for like in ours(name):
        arrays.append(flat[: like.size].reshape(like.shape))
        flat = flat[like.size :]
    assert not len(flat)
    return arrays


@pytest.mark.parametrize("changes", [{}, dict(attention="tiled"), dict(recompute=True)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_scores_loss_and_gradients_are_those_of_transformers(name, changes):
    compare(ours(name, **changes), recorded(name))


@pytest.mark.parametrize("changes", [dict(mlp="gelu_tanh"), dict(norm_eps=1.1e-3), dict(norm_placement="pre")], ids=str)
def test_a_wrong_setting_is_noticed(changes):
    with pytest.raises((AssertionError, ValueError)):
        compare(ours("bert", **changes), recorded("bert"))


def test_a_wrong_activation_in_the_head_is_noticed(monkeypatch):
    monkeypatch.setattr(ops, "gelu", ops.gelu_tanh)
    with pytest.raises(AssertionError):
        compare(ours("bert"), recorded("bert"))


@pytest.mark.peers
@pytest.mark.parametrize("name", MODELS)
def test_live(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(GOLDEN))
    import make_encoder as peers

    compare(ours(name), peers.theirs(name))
