"""What must hold for any causal language model, whatever it is made of."""
import gc
import tracemalloc

import numpy as np
import pytest
from by_definition import plain_ops

from tinyllm import ops
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.nn.config import POSITIONS
from tinyllm.nn.transformer import drop
from tinyllm.optim import AdamW
from tinyllm.tensor import Tensor, no_grad

V = 23
TINY = dict(vocab_size=V, layers=2, heads=4, width=16, mlp_width=20, context=16)
IDS, TARGETS = np.random.RandomState(0).randint(0, V, (2, 3, 12))


def model_of(dtype=np.float32, larger=0.4, **changes):
    """Weights larger than at the start, so that every score matters."""
    model = Transformer(TransformerConfig(**(TINY | changes)), np.random.default_rng(0), dtype)
    rng = np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data += (larger * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def scores(model, ids, **around):
    with no_grad():
        return model(ids, **around).data


def loss_of(model, ids=IDS, targets=TARGETS, rng=None):
    return ops.linear_cross_entropy(model.hidden(ids, rng=rng), model.output_weight, targets)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("vocab_size, width, layers", [(65, 32, 1), (512, 64, 4), (2000, 48, 6)])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_the_first_loss_is_that_of_a_guess(arch, vocab_size, width, layers, norm_placement):
    """ln V: at the start nothing is known, so every token is about equally likely."""
    config = TransformerConfig(vocab_size, arch, layers, heads=4, width=width, context=32, norm_placement=norm_placement)
    ids, targets = np.random.default_rng(0).integers(0, vocab_size, (2, 4, 32))
    with no_grad():
        loss = loss_of(Transformer(config, np.random.default_rng(0)), ids, targets).item()
    assert loss == pytest.approx(np.log(vocab_size), abs=0.05)


@pytest.mark.parametrize("changes", [{}, dict(window=5), dict(kv_heads=2, qk_norm=True, softcap=3.0), dict(norm_placement="post")], ids=str)
@pytest.mark.parametrize("attention", ["naive", "tiled"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_token_changes_nothing_before_it(positions, attention, changes):
    """Bitwise, in float32 as it is trained; and it does change its own scores."""
    model = model_of(positions=positions, attention=attention, **changes)
    before = scores(model, IDS)
    for t in (0, 5, 11):
        ids = IDS.copy()
        ids[:, t] = (ids[:, t] + 1) % V
        after = scores(model, ids)
        assert after[:, :t].tobytes() == before[:, :t].tobytes()
        assert (np.abs(after[:, t] - before[:, t]).max(-1) > 1e-3).all()


def test_a_window_hides_what_is_far():
    """Through two layers of window 4, a token reaches 2·3 positions on, no further."""
    model = model_of(window=4)
    ids = IDS.copy()
    ids[:, 2] = (ids[:, 2] + 1) % V
    changed = (scores(model, ids) != scores(model, IDS)).any((0, 2))
    assert changed.tolist() == [2 <= t <= 2 + 2 * 3 for t in range(12)]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("attention", ["naive", "tiled"])
def test_documents_in_one_row_do_not_see_each_other(positions, attention):
    model, documents = model_of(np.float64, positions=positions, attention=attention), np.array([[4] * 5 + [9] * 7] * 3)
    packed = scores(model, IDS, documents=documents)
    ids = IDS.copy()
    ids[:, :5] = (ids[:, :5] + 1) % V
    assert np.array_equal(scores(model, ids, documents=documents)[:, 5:], packed[:, 5:])
    np.testing.assert_allclose(packed[:, :5], scores(model, IDS[:, :5]), atol=1e-12)
    alone = np.abs(packed[:, 5:] - scores(model, IDS[:, 5:])).max()
    assert (alone < 1e-10) == (positions in ("rope", "alibi", "none"))  # tables of positions count on through the row


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_gradients_of_packed_documents_are_those_of_each_alone(arch):
    model = model_of(np.float64, arch=arch, positions="rope")
    documents = np.array([[0] * 5 + [1] * 7] * 3)
    ops.cross_entropy(model(IDS, documents=documents), TARGETS).backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    for _, p in model.named_parameters():
        p.grad = None
    for part in (slice(0, 5), slice(5, 12)):
        (ops.cross_entropy(model(IDS[:, part]), TARGETS[:, part]) * ((part.stop - part.start) / 12)).backward()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(packed[name], p.grad, atol=1e-12 * max(1, np.abs(p.grad).max()), err_msg=name)


def test_rows_of_a_batch_are_independent():
    model = model_of(np.float64)
    np.testing.assert_allclose(scores(model, IDS)[1:2], scores(model, IDS[1:2]), atol=1e-12)


def test_scores_and_loss_are_the_same_two_ways():
    model = model_of(np.float64, tie=False)
    assert loss_of(model).item() == pytest.approx(ops.cross_entropy(model(IDS), TARGETS).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("positions", POSITIONS)
def test_everything_stays_in_the_dtype_of_the_weights(dtype, positions):
    model = model_of(dtype, positions=positions, arch="gpt2", qk_norm=True, dropout=0.1, softcap=3.0)
    y = model.hidden(IDS, rng=np.random.default_rng(0))
    assert y.dtype == model(IDS).dtype == model.new_cache(2).layers[0].keys.dtype == dtype
    loss = ops.linear_cross_entropy(y, model.output_weight, TARGETS)
    loss.backward()
    assert loss.dtype == dtype and all(p.grad.dtype == dtype for _, p in model.named_parameters())


def test_dropout_is_off_without_a_generator():
    plain, dropping = model_of(), model_of(dropout=0.3)
    assert np.array_equal(scores(plain, IDS), scores(dropping, IDS))
    assert np.array_equal(scores(plain, IDS), scores(plain, IDS, rng=np.random.default_rng(0)))
    first, again, other = (scores(dropping, IDS, rng=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_dropout_keeps_the_mean():
    x, rng = Tensor(np.full((400, 500), 2.0, np.float32)), np.random.default_rng(0)
    y = drop(x, 0.3, rng).data
    assert y.mean() == pytest.approx(2, rel=0.01) and (y == 0).mean() == pytest.approx(0.3, rel=0.02)
    assert drop(x, 0.0, rng) is x and drop(x, 0.3, None) is x


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_dropout_touches_embeddings_and_each_part(norm_placement, monkeypatch):
    """Once on the embeddings, twice in each block, on (B, T, C)."""
    calls, real = [], ops.dropout
    monkeypatch.setattr(ops, "dropout", lambda x, **settings: calls.append((x.shape, settings["rate"])) or real(x, **settings))
    model_of(dropout=0.3, norm_placement=norm_placement).hidden(IDS, rng=np.random.default_rng(0))
    assert calls == [((3, 12, 16), 0.3)] * 5


def gradients(model):
    loss = loss_of(model, rng=np.random.default_rng(5))
    loss.backward()
    return loss.data, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, dict(dropout=0.2), dict(arch="gpt2", attention="tiled"), dict(precision="bf16", dropout=0.2)], ids=str)
def test_recomputing_changes_no_bit(changes):
    (loss, plain), (again, recomputed) = gradients(model_of(**changes)), gradients(model_of(**changes, recompute=True))
    assert loss == again
    for name, grad in plain.items():
        assert grad.tobytes() == recomputed[name].tobytes(), name


def test_recomputing_leaves_the_random_stream_where_it_was():
    """So that what is drawn after the forward does not depend on it."""
    streams = [np.random.default_rng(0), np.random.default_rng(0)]
    for stream, recompute in zip(streams, (False, True), strict=True):
        loss_of(model_of(dropout=0.2, recompute=recompute), rng=stream).backward()
    assert streams[0].random() == streams[1].random()


def test_recomputing_takes_less_memory():
    def held(recompute):
        model = model_of(layers=6, width=32, context=48, recompute=recompute)
        ids = np.zeros((4, 48), int)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        loss = loss_of(model, ids, ids)
        after = tracemalloc.get_traced_memory()[0]
        loss.backward()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return after - before, peak - before

    with plain_ops():
        (plain, plain_peak), (recomputed, recomputed_peak) = held(False), held(True)
    assert recomputed < 0.15 * plain and recomputed_peak < 0.5 * plain_peak


@pytest.mark.parametrize("changes", [
    dict(arch="gpt2"), dict(arch="llama", kv_heads=2), dict(arch="llama", norm_placement="post"),
    dict(arch="llama", positions="alibi", mlp="relu2", tie=False), dict(arch="gpt2", precision="bf16"),
], ids=str)  # fmt: skip
def test_one_batch_is_learned_by_heart(changes):
    model = model_of(larger=0.0, width=32, mlp_width=64, **changes)
    optimizer = AdamW(model.named_parameters(), weight_decay=0.0)
    for step in range(80):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step(1e-2 * min(1, (step + 1) / 5))
    assert loss.item() < 0.05


def test_a_model_without_positions_and_attention_over_one_token():
    """T = 1: attention has one key, so its result is that token's value, whatever the query."""
    model = model_of(np.float64, positions="none", layers=1)
    before = scores(model, IDS[:, :1])
    model.blocks[0].attention.query.weight.data += 1
    np.testing.assert_allclose(scores(model, IDS[:, :1]), before, atol=1e-12)


@pytest.mark.parametrize("ids, more, message", [
    (IDS[0], {}, r"the model takes ids of shape \(B, T\), T at least 1, got \(12,\)"),
    (IDS[:, :0], {}, r"got \(3, 0\)"),
    (np.zeros((1, 17), int), {}, "17 positions are more than the model's context of 16"),
    (IDS + V, {}, f"outside the vocabulary of {V}"),
    (IDS - V, {}, f"outside the vocabulary of {V}"),
    (IDS, dict(documents=IDS[:1]), r"documents have the shape \(1, 12\), ids \(3, 12\)"),
])  # fmt: skip
def test_misuse(ids, more, message):
    with pytest.raises(ValueError, match=message):
        model_of()(ids, **more)
