"""The key/value cache: whatever way a text is cut into calls, it gives the scores of one call over the whole text."""
import numpy as np
import pytest

from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.nn.config import POSITIONS
from tinyllm.tensor import no_grad

V, B, T = 23, 3, 20
TINY = dict(vocab_size=V, layers=2, heads=4, width=16, mlp_width=20, context=24)
IDS = np.random.RandomState(0).randint(0, V, (B, 60))
KINDS = [
    *(dict(positions=positions) for positions in POSITIONS),
    *(dict(positions=positions, window=5) for positions in POSITIONS),
    dict(attention="tiled"),
    dict(attention="tiled", window=5, positions="alibi", kv_heads=2),
    dict(kv_heads=2),
    dict(kv_heads=1),
    dict(kv_heads=2, window=1),
    dict(kv_heads=2, softcap=2.0, qk_norm=True),
    dict(norm_placement="post"),
    dict(arch="gpt2"),
    dict(recompute=True),
    dict(rope_scaling="yarn", rope_factor=4.0),
]


def model_of(**changes):
    """Weights larger than at the start, so that every score matters."""
    model = Transformer(TransformerConfig(**(TINY | changes)), np.random.default_rng(0), np.float64)
    rng = np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data += 0.4 * rng.standard_normal(p.shape)
    return model


def scores(model, ids, **around):
    with no_grad():
        return model(ids, **around).data


def in_chunks(model, ids, chunks, cache):
    ends = np.cumsum([0, *chunks])
    return np.concatenate([scores(model, ids[:, a:b], cache=cache) for a, b in zip(ends, ends[1:], strict=False)], axis=1)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(b).max())


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_cached_is_full(changes):
    model = model_of(**changes)
    full = scores(model, IDS[:, :T])
    for chunks in ([T], [1] * T, [7, 1, 1, 5, 6], [3, 17], [13, 7]):
        cache = model.new_cache(B)
        close(in_chunks(model, IDS[:, :T], chunks, cache), full)
        assert cache.length == T


def test_the_next_tokens_scores_are_the_last_ones():
    """Of a prompt, of a token, of a few."""
    model = model_of()
    full, cache, start = scores(model, IDS[:, :T]), model.new_cache(B), 0
    for n in (7, 1, 1, 3, 1):
        with no_grad():
            close(model.next_scores(IDS[:, start : start + n], cache).data, full[:, start + n - 1])
        start += n


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_rows_that_are_padded_on_the_left_are_as_they_are_alone(changes):
    model, lengths = model_of(**changes), [T, 13, 1]
    padded = np.zeros((B, T), int)
    for row, n in enumerate(lengths):
        padded[row, T - n :] = IDS[row, :n]
    cache = model.new_cache(B, left_padding=[T - n for n in lengths])
    found = in_chunks(model, padded, [15, 1, 4], cache)
    for row, n in enumerate(lengths):
        close(found[row, T - n :], scores(model, IDS[row : row + 1, :n])[0])


@pytest.mark.parametrize("attention", ["naive", "tiled"])
@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_a_window_rolls_without_end(positions, attention):
    """Beyond the context and several windows; first a prompt larger than the buffer, then token by token, then odd pieces."""
    model = model_of(positions=positions, window=6, context=8, attention=attention)
    for chunks in ([60], [1] * 60, [25, *[1] * 20, 7, 8], [5, 6, 7, 13, 29]):
        cache = model.new_cache(B)
        close(in_chunks(model, IDS, chunks, cache), scores(model, IDS))
        assert cache.length == 60
    assert cache.layers[0].keys.shape[2] <= 29 + 5  # no more than the largest piece and what it can see
    cache = model.new_cache(B)
    in_chunks(model, IDS, [1] * 60, cache)
    assert cache.layers[0].keys.shape[2] == 2 * 6


def test_a_rolling_window_with_padding():
    model, lengths = model_of(window=4, context=8), [30, 21, 2]
    padded = np.zeros((B, 30), int)
    for row, n in enumerate(lengths):
        padded[row, 30 - n :] = IDS[row, :n]
    found = in_chunks(model, padded, [5, *[1] * 10, 15], model.new_cache(B, left_padding=np.array([30 - n for n in lengths])))
    for row, n in enumerate(lengths):
        close(found[row, 30 - n :], scores(model, IDS[row : row + 1, :n])[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits(precision):
    """Other chunks are other products of matrices, so the last digit may fall to the other side of the grid."""
    model = Transformer(TransformerConfig(**TINY, precision=precision, kv_heads=2), np.random.default_rng(0))
    full, cache = scores(model, IDS[:, :T]), model.new_cache(B)
    np.testing.assert_allclose(in_chunks(model, IDS[:, :T], [9, 1, 10], cache), full, rtol=0, atol=0.05 * full.std())
    assert cache.layers[0].keys.dtype == np.float32


def test_reorder():
    """Rows move, are copied and dropped; then each goes on as the text that it holds."""
    model = model_of(kv_heads=2)
    for rows in ([2, 0, 1], [1, 1, 1], [2, 0], [0, 1, 2, 0]):
        cache = model.new_cache(B)
        scores(model, IDS[:, :9], cache=cache)
        cache.reorder(np.array(rows))
        whole = scores(model, np.concatenate([IDS[rows, :9], IDS[:1, 9:14].repeat(len(rows), 0)], axis=1))
        close(in_chunks(model, IDS[:1, 9:14].repeat(len(rows), 0), [1, 4], cache), whole[:, 9:])


def test_reorder_takes_the_padding_along():
    model = model_of()
    cache = model.new_cache(2, left_padding=[0, 4])
    scores(model, np.array([IDS[0, :9], [0] * 4 + [*IDS[1, :5]]]), cache=cache)
    cache.reorder(np.array([1, 0]))
    found = scores(model, IDS[[1, 0], 9:10], cache=cache)
    close(found[0], scores(model, np.array([[*IDS[1, :5], IDS[1, 9]]]))[0, -1:])
    close(found[1], scores(model, IDS[:1, :10])[0, -1:])


def test_refused_while_gradients_are_recorded():
    """Earlier keys and values are outside the graph: their gradient would be missing without a word."""
    model = model_of()
    cache = model.new_cache(B)
    with pytest.raises(RuntimeError, match=r"call the model with a cache under no_grad\(\)"):
        model(IDS[:, :4], cache=cache)
    close(in_chunks(model, IDS[:, :9], [4, 5], cache), scores(model, IDS[:, :9]))


@pytest.mark.parametrize("capacity, chunks, message", [
    (None, [20, 5], "the key/value cache holds 24 positions, 20 are used, and 5 more do not fit"),
    (8, [8, 1], "the key/value cache holds 8 positions, 8 are used, and 1 more do not fit"),
    (8, [9], "the key/value cache holds 8 positions, 0 are used, and 9 more do not fit"),
    (100, [25], "25 positions are more than the model's context of 24"),
])  # fmt: skip
def test_too_many_positions(capacity, chunks, message):
    model = model_of()
    cache = model.new_cache(B, capacity)
    for n in chunks[:-1]:
        scores(model, IDS[:, :n], cache=cache)
    before = cache.length
    with pytest.raises(ValueError, match=message):
        scores(model, IDS[:, : chunks[-1]], cache=cache)
    assert cache.length == before == cache.layers[0].used == cache.layers[1].used  # as it was: smaller pieces still fit


def test_a_table_of_positions_ends_a_window_too():
    model = model_of(positions="learned", window=3)
    with pytest.raises(ValueError, match="25 positions are more than the model's context of 24"):
        scores(model, IDS[:, :25])


@pytest.mark.parametrize("call, message", [
    (lambda m: m.new_cache(2, left_padding=[1]), r"left_padding is how many positions to hide in each of 2 rows, got \[1\]"),
    (lambda m: m.new_cache(2, left_padding=[0, -1]), "left_padding is how many"),
    (lambda m: m.new_cache(2, 0), "needs room for at least 1 position, got 0"),
    (lambda m: scores(m, IDS[:1, :3], cache=m.new_cache(2)), "the key/value cache is for 2 rows, got 1"),
    (lambda m: scores(m, IDS[:, :3], cache=m.new_cache(3), documents=IDS[:, :3]), "documents and a cache exclude each other"),
])  # fmt: skip
def test_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of())
