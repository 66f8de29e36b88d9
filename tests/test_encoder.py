"""The encoder sees both ways and no padding; the losses of masked tokens and next sentences are right means, also of parts of a batch."""
from dataclasses import replace

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.backend import random_stream
from tinyllm.data import IGNORE, MaskedBatch
from tinyllm.gradcheck import gradcheck
from tinyllm.kernels import plain_ops
from tinyllm.nn import Classifier, Encoder, MaskedLanguageModel, Transformer, TransformerConfig
from tinyllm.optim import flat
from tinyllm.processes import available
from tinyllm.tensor import no_grad
from tinyllm.threads import threads
from tinyllm.train import TrainConfig, masked_metrics, mlm_loss, mlm_nsp_loss, nsp_loss, train
from tinyllm.train.loop import mean_loss
from tinyllm.train.trainer import Trainer

TINY = dict(arch="bert", vocab_size=20, layers=2, heads=2, width=16, context=12)
CHOICES = [dict(), dict(norm_placement="pre"), dict(arch="llama"), dict(positions="alibi", attention="tiled"), dict(positions="sinusoidal", window=3)]


def encoder_of(dtype=np.float64, kind=Encoder, **choices):
    model = kind(TransformerConfig(**(TINY | choices)), np.random.default_rng(0), dtype)
    random = np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data += (0.3 * random.standard_normal(p.shape)).astype(dtype)
    return model


def masked_model(dtype=np.float64, **choices):
    return encoder_of(dtype, MaskedLanguageModel, **choices)


def batch_of(rows=6, seed=0, rate=0.3, dtype=np.float64):
    """Random rows of which the second half of the batch has no target."""
    random = np.random.default_rng(seed)
    ids = random.integers(20, size=(rows, 10))
    lengths = random.integers(4, 11, size=rows)
    documents = np.where(np.arange(10) < lengths[:, None], 0, IGNORE)
    chosen = (random.random(ids.shape) < rate) & (documents == 0) & (np.arange(rows)[:, None] < rows / 2)
    chosen[0, 1] = True
    targets = np.where(chosen, random.integers(20, size=ids.shape), IGNORE)
    segments = (np.arange(10) > lengths[:, None] // 2).astype(int)
    return MaskedBatch(ids, segments, documents, targets, random.integers(2, size=rows), np.count_nonzero(chosen) / rows)


def hidden(model, ids, **around):
    with no_grad():
        return model.hidden(ids, **around).data


# ---- the encoder ----

@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_padding_changes_nothing(choices):
    model, random = encoder_of(**choices), np.random.default_rng(2)
    ids, segments = random.integers(20, size=(1, 7)), np.array([[0, 0, 0, 1, 1, 1, 1]])
    alone = hidden(model, ids, segments=segments)
    for _ in range(2):  # whatever stands in it
        padded = np.concatenate([ids, random.integers(20, size=(1, 4))], 1)
        documents = np.array([[0] * 7 + [IGNORE] * 4])
        found = hidden(model, padded, segments=np.pad(segments, [(0, 0), (0, 4)]), documents=documents)
        np.testing.assert_allclose(found[:, :7], alone, rtol=1e-10, atol=1e-12)
        assert np.abs(hidden(model, padded)[:, :7] - alone).max() > 1e-3  # were it not told of


@pytest.mark.parametrize("choices", CHOICES[:-1], ids=str)
def test_every_token_sees_every_other(choices):
    model, ids = encoder_of(layers=1, **choices), np.arange(6)[None] % 20
    before = hidden(model, ids)
    for place in range(6):
        changed = ids.copy()
        changed[0, place] += 7
        assert (np.abs(hidden(model, changed) - before).max(-1) > 1e-6).all()


def test_a_window_reaches_both_ways():
    model, ids = encoder_of(layers=1, window=2), np.arange(6)[None]
    changed = ids.copy()
    changed[0, 3] = 9
    seen = np.abs(hidden(model, changed) - hidden(model, ids)).max(-1)[0] > 1e-9
    assert seen.tolist() == [False, False, True, True, True, False]


def test_one_token_and_no_segments():
    model = encoder_of()
    assert hidden(model, np.array([[3]])).shape == (1, 1, 16)
    ids = np.arange(5)[None]
    np.testing.assert_array_equal(hidden(model, ids), hidden(model, ids, segments=np.zeros((1, 5), int)))
    assert np.abs(hidden(model, ids, segments=np.ones((1, 5), int)) - hidden(model, ids)).max() > 1e-3


@pytest.mark.parametrize("around, message", [
    (dict(segments=np.zeros((1, 4), int)), "segments have the shape (1, 4), ids (1, 5)"),
    (dict(segments=np.full((1, 5), 2)), "id 2 is outside the vocabulary of 2"),
    (dict(documents=np.zeros((2, 5), int)), "documents have the shape (2, 5), ids (1, 5)"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(around, message):
    with pytest.raises(ValueError) as error:
        encoder_of().hidden(np.arange(5)[None], **around)
    assert message in str(error.value)


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match="13 positions are more than the model's context of 12"):
        encoder_of().hidden(np.zeros((1, 13), int))


def test_dropout_is_for_training():
    model, ids = encoder_of(dropout=0.5), np.arange(5)[None]
    assert np.abs(model.hidden(ids, rng=np.random.default_rng(0)).data - model.hidden(ids).data).max() > 0.1
    np.testing.assert_array_equal(model.hidden(ids).data, encoder_of().hidden(ids).data)


@pytest.mark.parametrize("choices", [dict(arch="gpt2"), dict(arch="llama"), dict()], ids=str)
def test_kernels_compute_the_same(choices):
    """Those of whole blocks are made for tokens that see none after them."""
    model = encoder_of(width=32, context=40, **choices)
    ids = np.random.default_rng(0).integers(20, size=(8, 40))
    found = hidden(model, ids)
    with plain_ops():
        np.testing.assert_allclose(found, hidden(model, ids), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_a_classifier_on_an_encoder_sees_no_padding(pooling):
    classifier = Classifier(encoder_of(), 3, pooling=pooling)
    classifier.head.weight.data[...] = np.random.default_rng(3).standard_normal((3, 16))
    ids, lengths = np.random.default_rng(4).integers(20, size=(2, 8)), np.array([5, 8])
    with no_grad():
        together = classifier(ids, lengths).data
        np.testing.assert_allclose(together[0], classifier(ids[:1, :5], np.array([5])).data[0], rtol=1e-10)


def test_a_decoder_stays_one():
    ids = np.arange(6)[None]
    model = encoder_of(kind=Transformer)
    before, changed = hidden(model, ids), ids.copy()
    changed[0, 4] = 9
    np.testing.assert_array_equal(hidden(model, changed)[0, :4], before[0, :4])


# ---- the losses ----

def test_the_first_loss_is_that_of_a_guess():
    model = MaskedLanguageModel(TransformerConfig(**TINY), np.random.default_rng(0))
    batch = batch_of()
    assert mlm_loss(model, batch, None).item() == pytest.approx(np.log(20), abs=0.05)
    assert nsp_loss(model, batch, None).item() == pytest.approx(np.log(2), abs=0.05)


def test_losses_by_their_definition():
    model, batch = masked_model(), batch_of()
    tokens, sentences = model(batch.ids, segments=batch.segments, documents=batch.documents)
    counted = batch.targets != IGNORE
    p = ops.log_softmax(tokens).data
    by_hand = -np.mean([p[b, t, batch.targets[b, t]] for b, t in np.argwhere(counted)])
    q = -ops.log_softmax(sentences).data[np.arange(6), batch.labels].mean()
    assert mlm_loss(model, batch, None).item() == pytest.approx(by_hand, rel=1e-12)
    assert nsp_loss(model, batch, None).item() == pytest.approx(q, rel=1e-12)
    assert mlm_nsp_loss(model, batch, None).item() == pytest.approx(by_hand + q, rel=1e-12)


@pytest.mark.parametrize("loss", [mlm_loss, nsp_loss, mlm_nsp_loss])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_the_mean_over_parts_is_that_of_the_whole(loss, count):
    """Value and gradient, though targets are shared out unevenly, and some parts have none."""
    model, whole = masked_model(), batch_of()
    parts = [whole.part(i, count) for i in range(count)]
    assert sum(part.weight for part in parts) == whole.weight and not (parts[-1].targets != IGNORE).any()
    config = TrainConfig(clip=0.0).planned(2)
    results = []
    for batches in ([whole], parts):
        value, _ = Trainer(model, loss, config).gradients(batches)
        results.append((value, [p.grad.copy() for _, p in model.named_parameters()]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    assert mean_loss(model, loss, parts) == pytest.approx(mean_loss(model, loss, [whole]), rel=1e-12)


@pytest.mark.skipif(not available, reason="no fork that is safe on this system")
def test_two_processes_learn_what_one_does(monkeypatch):
    monkeypatch.setattr(flat, "block_length", lambda xp: 100)  # so that a tiny model has some for both
    count, losses = threads(), []
    for size in (1, 2):
        threads(size)
        seen = []
        config = TrainConfig(lr=1e-2, threads=size).planned(3)
        try:
            train(masked_model(), lambda n: [batch_of(seed=n)], mlm_nsp_loss, config, observers=[lambda r, seen=seen: seen.append(r["loss"])])
        finally:
            threads(count)
        losses.append(seen)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-10)


@pytest.mark.parametrize("norm_placement", ["post", "pre"])
def test_gradients_agree_with_finite_differences(norm_placement):
    model, batch = masked_model(norm_placement=norm_placement, dropout=0.1, width=8, layers=1), batch_of().part(0, 2)
    report = gradcheck(
        lambda: mlm_nsp_loss(model, batch, np.random.default_rng(5)), parameters=dict(model.named_parameters()),
        method="projection", directions=2,
    )  # fmt: skip
    assert report, report


def test_where_nothing_is_masked_there_is_nothing_to_lose():
    model, batch = masked_model(), batch_of()
    none = MaskedBatch(batch.ids, batch.segments, batch.documents, np.full_like(batch.targets, IGNORE), batch.labels, batch.mean_targets)
    assert mlm_loss(model, none, None).item() == 0
    assert mlm_nsp_loss(model, none, None).item() == nsp_loss(model, batch, None).item()


def test_one_batch_overfits():
    model, batch = MaskedLanguageModel(TransformerConfig(**TINY), random_stream(0, "weights")), batch_of()
    before = masked_metrics(model, [batch])
    losses = []
    config = TrainConfig(lr=1e-2, weight_decay=0.0, threads=1).planned(150)
    train(model, lambda n: [batch], mlm_nsp_loss, config, observers=[lambda record: losses.append(record["loss"])])
    assert losses[0] > 3 and losses[-1] < 0.02
    assert before["mlm_accuracy"] < 0.5 and masked_metrics(model, [batch])["mlm_accuracy"] == 1


def test_accuracies_by_hand():
    """Of masked tokens in the rows as they are read, of sentences in the rows as they were."""
    model, batch = masked_model(), batch_of()
    clean = np.where(batch.targets == IGNORE, batch.ids, batch.targets)
    around = dict(segments=batch.segments, documents=batch.documents)
    tokens, sentences = model(batch.ids, **around)[0].data, model(clean, **around)[1].data
    counted = batch.targets != IGNORE
    found = masked_metrics(model, [batch.part(i, 3) for i in range(3)])
    assert found["mlm_accuracy"] == pytest.approx(np.mean(tokens.argmax(-1)[counted] == batch.targets[counted]))
    assert found["nsp_accuracy"] == pytest.approx(np.mean(sentences.argmax(-1) == batch.labels))
    assert masked_metrics(model, []) == {} and masked_metrics(model, [replace(batch, labels=None)]).keys() == {"mlm_accuracy"}
