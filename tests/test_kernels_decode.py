"""Decoding's kernels are held to the plain forward: block by block, for every architecture, however a text is cut, and never stale."""
import gc

import numpy as np
import pytest
from test_generate import KINDS as DECODED
from test_generate import PROMPTS, rows_of, transformer
from test_nn_cache import IDS, KINDS, TINY, B, model_of

from tinyllm import detect_anomaly, ops
from tinyllm.generate import SamplingConfig, generate
from tinyllm.kernels import plain_ops
from tinyllm.kernels.cpu import decode, few_rows, folded
from tinyllm.nn import Linear, Transformer, TransformerConfig
from tinyllm.nn.attention import Surroundings
from tinyllm.optim import AdamW
from tinyllm.tensor import Tensor, no_grad
from tinyllm.threads import threads

N = np.random.default_rng(0).standard_normal


@pytest.fixture(params=["block by block", "folded"])
def read(request, monkeypatch):
    """The blocks that the kernels have computed so far: each by itself, or all of a small model over rewritten weights."""
    blocks, parts, folded_call = [], decode._Parts, folded._Folded.__call__

    def noted(block):
        blocks.append(block)
        return parts(block)

    def all_noted(self, x, around):
        blocks.extend(self.model.blocks)
        return folded_call(self, x, around)

    monkeypatch.setattr(decode, "_Parts", noted)
    monkeypatch.setattr(folded._Folded, "__call__", all_noted)
    if request.param == "block by block":
        monkeypatch.setattr(folded, "SMALL", 0)
    return blocks


@pytest.fixture
def shared(monkeypatch):
    """Three threads, which share out whatever there is."""
    before = threads()
    monkeypatch.setattr(decode, "SHARE", 1)
    monkeypatch.setattr(folded, "SMALL", 0)
    threads(3)
    yield
    threads(before)


def states(model, ids, chunks, padding=None):
    """Hidden vectors of every position, padding included, and the keys and values left in the cache."""
    cache, found, start = model.new_cache(len(ids), left_padding=padding), [], 0
    with no_grad():
        for n in chunks:
            found.append(model.hidden(ids[:, start : start + n], cache=cache).data)
            start += n
    kept = [(layer.keys[:, :, : layer.used], layer.values[:, :, : layer.used]) for layer in cache.layers]
    return np.concatenate(found, axis=1), np.array(kept)


def both(model, *arguments):
    ours = states(model, *arguments)
    with plain_ops():
        return zip(ours, states(model, *arguments), strict=True)


def close(ours, theirs, tolerance=1e-12):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


# Products of a few rows.


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("outputs, inputs", [(1, 1), (15, 7), (64, 128), (65, 128), (130, 3), (1000, 33), (200, 3100), (40, 70000)])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
def test_products_of_few_rows(rows, outputs, inputs, dtype, tolerance):
    if rows * outputs * inputs > 10**7:
        return
    x, w = N((rows, inputs)).astype(dtype), N((outputs, inputs)).astype(dtype)
    close(few_rows.times(x, w), x @ w.T, tolerance)
    y = np.empty((rows, outputs), dtype)
    few_rows.product(x, np.ascontiguousarray(w.T), y)
    close(y, x @ w.T, tolerance)


@pytest.mark.parametrize("rows", [1, 8, 50])
def test_products_of_parts(rows):
    """Columns of a matrix, a transposed matrix, and a result that is a part of another array: nothing is written beside it."""
    x, w = N((rows, 40)), N((150, 100))
    close(few_rows.times(x, w[:, 30:70]), x @ w[:, 30:70].T)
    z = N((rows, 150))
    close(few_rows.times(z, w.T), z @ w)
    y = np.full((rows, 200), 7.0)
    few_rows.times(x, w[:, :40], out=y[:, 20:170])
    close(y[:, 20:170].copy(), x @ w[:, :40].T)
    assert (y[:, :20] == 7).all() and (y[:, 170:] == 7).all()


@pytest.mark.parametrize("rows, outputs, inputs", [(3, 0, 5), (0, 4, 5), (3, 100, 0), (3, 0, 0)])
def test_empty_matrices(rows, outputs, inputs):
    found = few_rows.times(N((rows, inputs)), N((outputs, inputs)))
    assert found.shape == (rows, outputs) and not found.any()


@pytest.mark.parametrize("rows", [1, 2, 8, 40])
def test_the_linear_op_of_few_rows(rows):
    x, w, b = N((rows, 1, 500)), N((4099, 500)), N(4099)
    with no_grad():
        close(ops.linear(x, w, b).data, ops.linear.array(x, w, b)[0])


# The block.


@pytest.mark.parametrize("changes", KINDS + [dict(mlp=mlp) for mlp in ("gelu", "relu", "relu2", "silu", "geglu")] + [dict(arch="gpt2", bias=False)], ids=str)
@pytest.mark.parametrize("padding", [None, [0, 7, 16]], ids=["even", "padded"])
def test_equals_the_plain_forward(changes, padding, read):
    model = model_of(**changes)
    for chunks in ([1] * 20, [12, *[1] * 5, 2, 1]):
        for ours, theirs in both(model, IDS[:, :20], chunks, padding):
            close(ours, theirs)
    assert len(read) == TINY["layers"] * (20 + 8)


@pytest.mark.parametrize("changes", [dict(), dict(kv_heads=2, positions="alibi"), dict(kv_heads=1), dict(arch="gpt2", norm_placement="post")], ids=str)
def test_shared_out_over_threads(changes, shared):
    """Equal to the plain forward, and the same bits every time."""
    model = model_of(**changes)
    for ours, theirs in both(model, IDS[:, :20], [12, *[1] * 8]):
        close(ours, theirs)
    first = states(model, IDS[:, :20], [12, *[1] * 8])
    for _ in range(5):
        assert all(np.array_equal(a, b) for a, b in zip(first, states(model, IDS[:, :20], [12, *[1] * 8]), strict=True))


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_a_window_that_rolls(positions, read):
    model = model_of(positions=positions, window=6, context=8)
    for ours, theirs in both(model, IDS, [25, *[1] * 25, 7, 3]):
        close(ours, theirs)


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_ids(kind, dtype, read):
    model, config = transformer(kind, dtype), SamplingConfig(max_tokens=30, temperature=0)
    ours = [ids for ids, _ in rows_of(generate(model, PROMPTS, config))]
    with plain_ops():
        assert ours == [ids for ids, _ in rows_of(generate(model, PROMPTS, config))]


def test_never_stale(read):
    """Weights may change in every way between two texts: in place, by another array, by the optimizer, by loading."""
    model = model_of()
    optimizer = None

    def change(number):
        nonlocal optimizer
        weight = model.blocks[0].attention.query.weight
        if number == 0:
            weight.data *= 1.5
        elif number == 1:
            weight.data = weight.data + 0.3
        elif number == 2:
            optimizer = AdamW(model.named_parameters())
            ops.linear_cross_entropy(model.hidden(IDS[:, :9]), model.output_weight, IDS[:, 1:10]).backward()
            optimizer.step(0.1)
        elif number == 3:
            model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})

    states(model, IDS[:, :5], [4, 1])
    for number in range(4):
        change(number)
        for ours, theirs in both(model, IDS[:, :12], [10, 1, 1]):
            close(ours, theirs)


def test_what_it_is_not_made_for_goes_to_the_plain_forward(read):
    """16 bits, layers that it does not know, many rows at once, dropout, gradients, and looking for anomalies."""
    for changes in (dict(precision="bf16"), dict(precision="fp16")):
        model = Transformer(TransformerConfig(**TINY, **changes), np.random.default_rng(0))
        for ours, theirs in both(model, IDS[:, :6], [4, 1, 1]):
            assert np.array_equal(ours, theirs)

    class Twice(Linear):
        def forward(self, x, rng=None):
            return super().forward(x) * 2

    model = model_of()
    model.blocks[1].mlp.down.__class__ = Twice
    before = len(read)
    for ours, theirs in both(model, IDS[:, :6], [5, 1]):
        close(ours, theirs)
    assert len(read) == before + 2  # block 0 alone, twice

    model, before = model_of(window=6), len(read)
    states(model, np.zeros((1, decode.ROWS + 1), int), [decode.ROWS + 1])
    with detect_anomaly():
        states(model, IDS[:, :6], [5, 1])
    with pytest.raises(RuntimeError, match="carries no gradients"):
        model(IDS[:, :4], cache=model.new_cache(B))
    model(IDS[:, :4])
    assert len(read) == before


def test_the_input_is_left_as_it_was(read):
    model, x = model_of(positions="none"), N((B, 1, TINY["width"]))
    before = x.copy()
    with no_grad():
        model.blocks[0](Tensor(x), Surroundings(cache=model.new_cache(B)), 0)
        model.stack(Tensor(x), Surroundings(cache=model.new_cache(B)))
    assert np.array_equal(x, before)


# The small model's rewritten weights.


@pytest.mark.parametrize("changes", [dict(arch="gpt2"), dict(kv_heads=2, qk_norm=True)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 9, 33])
def test_batches_of_every_size(changes, rows, read):
    """Wide enough for products to be taken in blocks."""
    model = model_of(**changes, width=96, mlp_width=400)
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (rows, 8))
    for ours, theirs in both(model, ids, [5, 1, 1, 1]):
        close(ours, theirs)
    assert len(read) == TINY["layers"] * 4


def test_rows_far_from_mean_0(read):
    """Which LayerNorm takes away, and the rewritten weights never let in."""
    model = model_of(arch="gpt2")
    for weight in (model.embedding.weight, *(block.mlp.down.bias for block in model.blocks)):
        weight.data += 30
    for ours, theirs in both(model, IDS[:, :12], [9, 1, 1, 1]):
        close(ours, theirs)


def test_texts_side_by_side():
    """Two models and three caches in turn, rows that move, and room that is given back with the cache."""
    models = [model_of(), model_of(), model_of(arch="gpt2")]
    models[1].load_state_dict({name: value * 0.9 for name, value in models[0].state_dict().items()})
    gc.collect()
    before = len(folded._folded)

    def turns():
        caches, found = [model.new_cache(B) for model in models], []
        with no_grad():
            for step in range(6):
                for model, cache in zip(models, caches, strict=True):
                    ids = IDS[: len(cache.layers[0].keys), 3 * step : 3 * step + 3]
                    found.append(model.hidden(ids, cache=cache).data)
                    if step == 3:
                        cache.reorder(np.array([2, 0]))
        return found, caches

    found, caches = turns()
    assert len(folded._folded) == before + 3
    del caches
    assert len(folded._folded) == before
    with plain_ops():
        for ours, theirs in zip(found, turns()[0], strict=True):
            close(ours, theirs)
