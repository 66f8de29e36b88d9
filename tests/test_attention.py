"""Attention: against loops over every query and key, at the edges, and the tiled form against the definition, in value and in memory."""
import itertools
import math
import sys
import tracemalloc
import warnings

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.ops import attention, tiled_attention, visible
from tinyllm.tensor import Tensor

FORMS = pytest.mark.parametrize("form", [attention, tiled_attention])


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def heads(B=2, H=4, G=2, T=7, S=7, D=3, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for shape in ((B, H, T, D), (B, G, S, D), (B, G, S, D))]


def run(form, q, k, v, *masks, seed=1, **settings):
    """[o, dq, dk, dv] with a random upstream gradient."""
    tensors = [Tensor(x, requires_grad=True) for x in (q, k, v)]
    o = form(*tensors, *masks, **settings)
    o.backward(np.random.default_rng(seed).standard_normal(o.shape))
    return [o.data, *(t.grad for t in tensors)]


def by_loops(q, k, v, padding=None, documents=None, slopes=None, causal=True, window=None, offset=0, softcap=None, scale=None):
    """The definition, one query and one key at a time."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    o = np.zeros(q.shape)
    for b, h, t in np.ndindex(B, H, T):
        weights, place = [], t + offset
        group = h // (H // G)
        for s in range(S):
            score = sum(q[b, h, t, d] * k[b, group, s, d] for d in range(D)) * (1 / math.sqrt(D) if scale is None else scale)
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            if slopes is not None:
                score -= slopes[h] * abs(place - s)
            seen = not (causal and s > place) and (window is None or abs(place - s) < window)
            seen = seen and (padding is None or bool(padding[b, s])) and (documents is None or documents[b, s] == documents[b, place])
            weights.append(math.exp(score) if seen else 0.0)
        if sum(weights):
            o[b, h, t] = sum(w * v[b, group, s] for s, w in enumerate(weights)) / sum(weights)
    return o


PADDING = np.arange(7) < np.array([7, 4])[:, None]
DOCUMENTS = np.array([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2, 3]])
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])
MASKS = {  # padding, documents, slopes: all eight combinations
    " ".join(("padding",) * p + ("documents",) * d + ("slopes",) * a) or "none": (PADDING if p else None, DOCUMENTS if d else None, SLOPES if a else None)
    for p, d, a in itertools.product((0, 1), repeat=3)
}
every_mask = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)


@FORMS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@every_mask
def test_every_combination_of_masks_by_loops(form, causal, window, masks):
    q, k, v = heads()
    settings = dict(causal=causal, window=window, softcap=2.0 if causal else None, scale=None if causal else 0.7)
    found = form.array(q, k, v, *masks, **settings)[0]
    assert np.allclose(found, by_loops(q, k, v, *masks, **settings), rtol=1e-12, atol=1e-14)


# The tiled form is the definition.


def assert_same(*args, block, **settings):
    expected, found = run(attention, *args, **settings), run(tiled_attention, *args, block=block, **settings)
    for name, a, b in zip(("o", "dq", "dk", "dv"), expected, found, strict=True):
        assert a.shape == b.shape and np.abs(a - b).max(initial=0) <= 1e-12 * max(1, np.abs(a).max(initial=0)), name


@pytest.mark.parametrize("block", [1, 2, 3, 64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@every_mask
def test_tiled_is_naive_under_every_combination_of_masks(block, causal, window, masks):
    assert_same(*heads(), *masks, block=block, causal=causal, window=window, softcap=1.5 if window else None)


SHAPES = {
    "one position": dict(T=1, S=1),
    "one key": dict(T=3, S=1),
    "one query": dict(T=1, S=9, offset=8),
    "cache": dict(T=3, S=10, offset=7),
    "cache with room": dict(T=3, S=10, offset=4),
    "one head": dict(H=1, G=1),
    "multi-query": dict(H=6, G=1),
    "no groups": dict(H=3, G=3),
    "width 1": dict(D=1),
    "blocks that do not fit": dict(T=13, S=13),
    "two-sided": dict(T=9, S=9, causal=False),
    "two-sided, more keys": dict(T=4, S=11, causal=False),
    "two-sided window": dict(T=12, S=12, causal=False, window=3),
    "window and cache": dict(T=2, S=12, offset=10, window=4),
    "soft cap": dict(T=9, S=9, softcap=0.7),
    "scale 0": dict(scale=0.0),
    "scale 3": dict(scale=3.0),
    "no batch": dict(B=0),
    "no queries": dict(T=0, S=4),
}


@pytest.mark.parametrize("block", [1, 2, 3, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_tiled_is_naive_for_every_shape(name, block):
    sizes = {k: v for k, v in SHAPES[name].items() if k in "BHGTSD"}
    settings = {k: v for k, v in SHAPES[name].items() if k not in "BHGTSD"}
    assert_same(*heads(**sizes), block=block, **settings)


def test_tiled_is_naive_at_random():
    random = np.random.default_rng(7)
    for seed in range(40):
        G, T, offset = (int(n) for n in random.integers(1, [4, 20, 9]))
        S = T + offset
        args = heads(B=2, H=G * int(random.integers(1, 4)), G=G, T=T, S=S, D=int(random.integers(1, 5)), seed=seed)
        documents = np.sort(random.integers(0, 4, (2, S))) if random.random() < 0.5 else None
        padding = random.random((2, S)) < 0.8 if random.random() < 0.5 else None
        window = int(random.integers(1, S + 1)) if random.random() < 0.5 else None
        assert_same(*args, padding, documents, None, block=int(random.integers(1, 9)), causal=bool(random.random() < 0.7), window=window, offset=offset)


# At the edges.


@FORMS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_query_that_sees_nothing_gets_0_and_gives_no_gradient(form, dtype):
    q, k, v = heads(T=5, S=5, dtype=dtype)
    padding = np.zeros((2, 5), bool)
    o, dq, dk, dv = run(form, q, k, v, padding)
    for x in (o, dq, dk, dv):
        assert (x == 0).all() and x.dtype == dtype
    padding[0] = [False, True, True, True, True]  # in the first row, only the first query sees nothing
    o, dq, dk, dv = run(form, q, k, v, padding)
    assert (o[0, :, 0] == 0).all() and (dq[0, :, 0] == 0).all() and (o[1] == 0).all() and (dk[1] == 0).all()
    assert (o[0, :, 1:] != 0).all() and np.isfinite(dk).all() and (dk[0, :, 0] == 0).all() and (dv[0, :, 0] == 0).all()


@FORMS
def test_one_position_gives_back_the_value(form):
    q, k, v = heads(T=1, S=1, H=2, G=2)
    o, dq, dk, dv = run(form, q, k, v)
    assert np.array_equal(o, v) and np.allclose(dq, 0) and np.allclose(dk, 0)


@FORMS
def test_huge_scores_pick_the_best_key(form):
    """Scores of 1e30 in float32: the largest wins, nothing overflows."""
    q = np.full((1, 1, 3, 1), 1e15, np.float32)
    k = np.array([1e15, -1e15, 2e15], np.float32).reshape(1, 1, 3, 1)
    v = np.array([1.0, 2.0, 3.0], np.float32).reshape(1, 1, 3, 1)
    o, *gradients = run(form, q, k, v)
    assert o.ravel().tolist() == [1, 1, 3] and all(np.isfinite(g).all() for g in gradients)


@FORMS
def test_padding_may_be_zeros_and_ones(form):
    q, k, v = heads()
    expected = run(form, q, k, v, PADDING)
    for dtype in (int, np.uint8, np.float64):
        assert all(np.array_equal(a, b) for a, b in zip(run(form, q, k, v, PADDING.astype(dtype)), expected, strict=True))


@FORMS
def test_what_is_hidden_may_be_anything(form):
    """Values behind a mask do not leak, whatever they are."""
    q, k, v = heads()
    expected = run(form, q, k, v, PADDING)
    for x in (k, v):
        x[1, :, 4:] = 1e100
    found = run(form, q, k, v, PADDING)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


@FORMS
@pytest.mark.parametrize("changed", range(7))
def test_later_positions_leave_earlier_outputs_bitwise_unchanged(form, changed):
    q, k, v = heads(dtype=np.float32)
    before = form.array(q, k, v)[0]
    for x in (q, k, v):
        x[:, :, changed] += 1
    after = form.array(q, k, v)[0]
    assert np.array_equal(before[:, :, :changed], after[:, :, :changed]) and (before[:, :, changed:] != after[:, :, changed:]).any()


@FORMS
def test_documents_side_by_side_are_documents_alone(form):
    q, k, v = heads(T=9, S=9)
    together = run(form, q, k, v, None, np.array([[0] * 4 + [1] * 5] * 2), seed=3)
    dy = np.random.default_rng(3).standard_normal(q.shape)
    for part in (slice(0, 4), slice(4, 9)):
        tensors = [Tensor(x[:, :, part].copy(), requires_grad=True) for x in (q, k, v)]
        o = form(*tensors)
        o.backward(dy[:, :, part])
        for a, b in zip(together, [o.data, *(t.grad for t in tensors)], strict=True):
            assert np.allclose(a[:, :, part], b, rtol=1e-12, atol=1e-14)


@FORMS
def test_a_cache_is_a_part_of_the_whole(form):
    q, k, v = heads(T=10, S=10)
    whole = form.array(q, k, v, None, None, SLOPES, window=6)[0]
    for first, last in [(0, 1), (3, 4), (4, 8), (9, 10)]:
        part = form.array(q[:, :, first:last], k[:, :, :last], v[:, :, :last], None, None, SLOPES, window=6, offset=first)[0]
        assert np.allclose(part, whole[:, :, first:last], rtol=1e-12)


@FORMS
def test_shared_heads_are_repeated_heads(form):
    q, k, v = heads(H=6, G=2)
    o, dq, dk, dv = run(form, q, k, v)
    repeated = run(form, q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1))
    assert np.allclose(o, repeated[0], rtol=1e-13) and np.allclose(dq, repeated[1], rtol=1e-12, atol=1e-14)
    for shared, each in ((dk, repeated[2]), (dv, repeated[3])):
        assert np.allclose(shared, each.reshape(2, 2, 3, 7, 3).sum(2), rtol=1e-12, atol=1e-14)


def test_visible_by_the_definition():
    queries, keys = np.array([2, 3, 7]), np.arange(9)
    for causal, window in itertools.product([True, False], [None, 1, 3]):
        seen = visible(queries, keys, causal=causal, window=window)
        for i, j in np.ndindex(3, 9):
            near = window is None or abs(queries[i] - keys[j]) < window
            assert seen[i, j] == (near and (not causal or keys[j] <= queries[i]))


@FORMS
def test_float32_is_close_to_float64(form):
    args = heads(T=50, S=50, D=16)
    exact, found = run(form, *args), run(form, *(x.astype(np.float32) for x in args))
    for a, b in zip(exact, found, strict=True):
        assert b.dtype == np.float32 and np.abs(a - b).max() < 2e-6 * np.abs(a).max()


# Memory.


def peak_memory(T, backward, **settings):
    random = np.random.default_rng(0)
    q, k, v = (Tensor(random.standard_normal((1, 1, T, 4), dtype=np.float32), requires_grad=True) for _ in range(3))
    tracemalloc.start()
    try:
        o = tiled_attention(q, k, v, **settings)
        if backward:
            o.backward(o.data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_tiled_memory_is_linear(backward):
    lengths = (256, 1024, 4096)
    peaks = [peak_memory(T, backward, block=64, window=512) for T in lengths]
    blocks = 20 * 64 * 64 * 4  # what one block of scores, its mask and its temporaries may take
    for T, peak in zip(lengths, peaks, strict=True):
        assert peak < blocks + 20 * T * 4 * 4, (T, peak)  # some arrays of q's size
    assert peaks[2] < 4.5 * peaks[1]
    assert peaks[2] < 4096 * 4096 / 8  # not even a bit for each pair of positions


def test_tiled_memory_is_linear_with_documents_and_no_window():
    random = np.random.default_rng(0)
    documents = np.sort(random.integers(0, 5, (1, 2048)))
    peak = peak_memory(2048, True, documents=documents, slopes=np.array([0.01]), block=128)
    assert peak < 2048 * 2048 * 4 / 8


def test_blocks_that_positions_hide_are_never_computed(monkeypatch):
    module = sys.modules["tinyllm.ops.tiled_attention"]
    computed = []
    scores = module.scores
    monkeypatch.setattr(module, "scores", lambda *args: computed.append(1) or scores(*args))
    q, k, v = heads(T=64, S=64)
    for settings, forward in [(dict(), 36), (dict(causal=False), 64), (dict(window=8), 15), (dict(window=9), 15), (dict(causal=False, window=9), 22), (dict(window=10), 21)]:
        computed.clear()
        run(tiled_attention, q, k, v, block=8, **settings)
        assert len(computed) == 2 * forward  # as many again in the backward


def test_masks_are_arguments_by_name_too():
    q, k, v = (Tensor(x) for x in heads())
    by_name = ops.attention(q, k, v, documents=DOCUMENTS, slopes=SLOPES)
    assert np.array_equal(by_name.data, ops.attention(q, k, v, None, DOCUMENTS, SLOPES).data)
