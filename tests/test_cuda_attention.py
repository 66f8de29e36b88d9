"""FlashAttention on a device against `ops.attention` in float64: every head width, format and band, odd sizes, strides, and what goes wrong.

On the CPU, where kernels run in the emulator, and with `-m gpu` on a GPU.
"""
import functools
import math

import numpy as np
import pytest
from cuda_on_cpu import CudaError, in_every_order, traffic

from tinyllm import ops
from tinyllm.backend import deterministic, to_numpy
from tinyllm.kernels.cuda import attention, launch, storage
from tinyllm.tensor import Tensor

TOLERANCE = {"fp16": 1e-3, "bf16": 8e-3}  # relative to the largest value: weights, their derivatives and results are rounded once each
PLAIN = dict(causal=True, window=None, offset=0, scale=None, documents=None)


def in_rows(B, T, documents):
    """Numbers of documents that share rows, as packing lays them, with padding, a document -1, at the end of the first.     (B, T)"""
    numbers = np.sort(np.random.default_rng([B, T]).integers(0, documents, (B, T)))
    numbers[0, -T // 9 :] = -1
    return numbers


SHAPES = {  # B, H, G, T, S, D and settings; at a width each
    "one query, a cache": (2, 2, 1, 1, 131, 64, dict(offset=130)),
    "prefill after a cache": (1, 2, 1, 70, 130, 96, dict(offset=60)),
    "groups of three": (1, 6, 2, 129, 129, 64, {}),
    "a head for all": (2, 2, 1, 33, 33, 128, {}),
    "several tiles": (1, 1, 1, 300, 300, 32, {}),
    "all see all": (1, 2, 2, 100, 37, 128, dict(causal=False)),
    "more keys than queries": (1, 1, 1, 3, 200, 32, dict(causal=False)),
    "window": (1, 2, 1, 200, 200, 64, dict(window=33)),
    "window of one": (1, 1, 1, 90, 90, 96, dict(window=1)),
    "window both ways": (1, 2, 1, 150, 130, 128, dict(window=20, causal=False)),
    "window and offset": (1, 1, 1, 70, 200, 64, dict(window=50, offset=130)),
    "queries before the keys": (1, 1, 1, 50, 40, 96, dict(offset=-20)),
    "keys before the queries' window": (1, 1, 1, 40, 40, 64, dict(window=10, offset=30)),
    "empty window": (1, 1, 1, 40, 40, 32, dict(window=0)),
    "own scale": (1, 1, 1, 65, 65, 128, dict(scale=0.3)),
    "one token": (3, 2, 2, 1, 1, 32, {}),
    "documents": (2, 2, 1, 200, 200, 64, dict(documents=in_rows(2, 200, 5))),
    "short documents": (2, 1, 1, 130, 130, 32, dict(documents=in_rows(2, 130, 40))),
    "documents with a window": (1, 2, 2, 150, 150, 96, dict(documents=in_rows(1, 150, 3), window=33)),
    "documents both ways": (1, 2, 1, 300, 300, 128, dict(documents=in_rows(1, 300, 4), causal=False)),
}


def numbers(shape, precision, seed=0, spread=1.0):
    """Random numbers that the format has, on the host."""
    return (spread * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(storage.dtype_of(precision))


def arguments(B, H, G, T, S, D, precision, seed=0):
    """q, k, v and do on the host."""
    return [numbers(shape, precision, seed + i) for i, shape in enumerate([(B, H, T, D), (B, G, S, D), (B, G, S, D), (B, H, T, D)])]


def full(settings, D):
    settings = PLAIN | settings
    return settings | dict(scale=settings["scale"] or 1 / math.sqrt(D))


def by_definition(q, k, v, do, **settings):
    """o, lse, dq, dk, dv in float64."""
    q, k, v, do = (x.astype(np.float64) for x in (q, k, v, do))
    o, backward = ops.attention.array(q, k, v, **settings)
    s = settings["scale"] * q @ np.repeat(k, q.shape[1] // k.shape[1], 1).swapaxes(-1, -2)
    positions = np.arange(q.shape[2]) + settings["offset"], np.arange(k.shape[2])
    s[..., ~ops.visible(*positions, causal=settings["causal"], window=settings["window"])] = -np.inf
    if settings["documents"] is not None:
        s[np.broadcast_to((settings["documents"][:, None, :, None] != settings["documents"][:, None, None, :]), s.shape)] = -np.inf
    lse = np.logaddexp.reduce(s, -1)
    return o, np.where(lse == -np.inf, np.inf, lse), *backward(do)[:3]


def by_kernel(xp, q, k, v, do, *, exact, **settings):
    """The same from the kernels, on the host. exact : their `deterministic`."""
    q, k, v, do = map(xp.asarray, (q, k, v, do))
    settings["documents"] = None if settings["documents"] is None else attention.edges(xp, settings["documents"])
    o, lse = attention.forward(q, k, v, **settings)
    return tuple(map(to_numpy, (o, lse, *attention.backward(q, k, v, o, lse, do, deterministic=exact, **settings))))


def error(ours, theirs):
    """The largest difference, relative to the largest value, or to 0.1 where all are smaller. NaN fails every comparison."""
    assert ours.shape == theirs.shape
    with np.errstate(invalid="ignore"):
        differences = np.where(ours == theirs, 0, np.abs(ours.astype(np.float64) - theirs))      # ∞ - ∞ where there is nothing to see
    return float(differences.max(initial=0)) / float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.1))


def check(world, arrays, precision, *, exact=False, **settings):
    ours, theirs = by_kernel(world.xp, *arrays, exact=exact, **settings), by_definition(*arrays, **settings)
    assert all(x.dtype == arrays[0].dtype for x in (ours[0], *ours[2:])) and ours[1].dtype == np.float32
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert error(a, b) < (1e-5 if name == "lse" else TOLERANCE[precision]), name
    return ours


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", SHAPES)
def test_equals_its_op(world, case, exact):
    *shape, settings = SHAPES[case]
    check(world, arguments(*shape, "fp16"), "fp16", exact=exact, **full(settings, shape[-1]))


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("width", attention.TILES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_format_and_width(world, precision, width, exact):
    T = world.size(130, 1027)
    check(world, arguments(1, 2, 1, T, T, width, precision), precision, exact=exact, **full({}, width))


@pytest.mark.parametrize("seed", range(3))
def test_many_heads(world, seed):
    """More of them than run side by side: every block finds its own."""
    B, H, G, T, D = world.size((3, 4, 2, 70, 32), (4, 16, 8, 2048, 64))
    check(world, arguments(B, H, G, T, T, D, "bf16", seed), "bf16", exact=seed == 1, **full({}, D))


@pytest.mark.parametrize("cached", [1, 3 * 4 * 70 * 32])
def test_some_heads_at_a_time(world, cached, monkeypatch):
    monkeypatch.setattr(attention, "CACHED", cached)
    check(world, arguments(3, 4, 4, 140, 140, 32, "fp16"), "fp16", **full({}, 32))


@pytest.mark.parametrize("T, S", [(5, 0), (0, 5), (0, 0)])
def test_nothing_there(world, T, S):
    o, lse, dq, dk, dv = by_kernel(world.xp, *arguments(1, 2, 1, T, S, 64, "fp16"), exact=False, **full({}, 64))
    assert o.shape == dq.shape == (1, 2, T, 64) and dk.shape == dv.shape == (1, 1, S, 64)
    assert (lse == np.inf).all() and not any(x.any() for x in (o, dq, dk, dv))


def test_a_query_that_sees_nothing(world):
    o, lse, dq, _, _ = check(world, arguments(1, 1, 1, 50, 40, 32, "fp16"), "fp16", **full(dict(offset=-20), 32))
    assert (lse[..., :20] == np.inf).all() and not o[..., :20, :].any() and not dq[..., :20, :].any()


@pytest.mark.parametrize("width", [64, 128])
def test_scores_far_below_zero(world, width):
    """A tile's rows beyond the last key have score 0: if they were not hidden, they would outweigh all that is there, or overflow.

    Weights are near 0 and 1 here, so that dp - δ cancels down to o's rounding, and the fp16 gradients are held to bf16's tolerance.
    """
    q, k, v, do = arguments(1, 1, 1, 37, 37, width, "fp16")
    check(world, (np.abs(q) * 4, -np.abs(k), v, do), "bf16", **full(dict(causal=False, scale=1.0), width))


def test_not_a_number_stays_where_it_is(world):
    q, k, v, do = arguments(1, 1, 1, 70, 70, 64, "fp16")
    q[0, 0, 33, 5] = np.nan
    o, lse, *_ = by_kernel(world.xp, q, k, v, do, exact=True, **full({}, 64))
    assert np.isnan(o[0, 0, 33]).all() and np.isnan(lse[0, 0, 33]) and not np.isnan(np.delete(o, 33, 2)).any()


# ---- where arrays lie


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "deterministic"])
def test_parts_of_one_array(world, exact):
    """q, k and v as one product makes them, and their gradients as one product wants them: nothing is copied."""
    xp, (B, H, G, T, D) = world.xp, (2, 4, 2, 67, 32)
    settings = full({}, D)
    together = xp.asarray(numbers((B, T, H + 2 * G, D), "bf16"))
    joint, do = xp.empty(together.shape, together.dtype), xp.asarray(numbers((B, T, H, D), "bf16", 1)).swapaxes(1, 2)
    parts = [slice(0, H), slice(H, H + G), slice(H + G, None)]
    q, k, v = (together.swapaxes(1, 2)[:, part] for part in parts)
    assert all(attention.reachable(x) is x for x in (q, k, v, do))
    o, lse = attention.forward(q, k, v, **settings)
    out = tuple(joint.swapaxes(1, 2)[:, part] for part in parts)
    assert all(x is y for x, y in zip(attention.backward(q, k, v, o, lse, do, deterministic=exact, out=out, **settings), out, strict=True))
    theirs = by_definition(*map(to_numpy, (q, k, v, do)), **settings)
    assert error(to_numpy(o), theirs[0]) < TOLERANCE["bf16"]
    assert error(to_numpy(joint), np.concatenate(theirs[2:], 1).swapaxes(1, 2)) < TOLERANCE["bf16"]


def test_results_lie_as_heads_are_merged(world):
    q, k, v, do = map(world.xp.asarray, arguments(2, 2, 2, 5, 5, 32, "fp16"))
    o, lse = attention.forward(q, k, v, **full({}, 32))
    for x in (o, *attention.backward(q, k, v, o, lse, do, deterministic=False, **full({}, 32))):
        assert x.swapaxes(1, 2).flags.c_contiguous


def test_any_strides(world):
    """Rows in pieces, rows at odd addresses, positions in reverse, one row for all as a broadcast gradient has it."""
    xp, settings = world.xp, full(dict(scale=0.2), 32)
    q, k, v, do = arguments(1, 2, 2, 40, 40, 32, "fp16")
    do[...] = do[:, :, :1]
    pieces = xp.asarray(np.ascontiguousarray(q.swapaxes(-1, -2))).swapaxes(-1, -2)
    odd = xp.zeros(k.size + 1, k.dtype)[1:].reshape(k.shape)
    odd[...] = xp.asarray(k)
    backwards = xp.asarray(np.ascontiguousarray(v[:, :, ::-1]))[:, :, ::-1]
    one = xp.broadcast_to(xp.asarray(do[:, :, :1]), do.shape)
    assert [attention.is_reachable(x) for x in (pieces, odd, backwards, one)] == [False, False, True, True]
    o, lse = attention.forward(pieces, odd, backwards, **settings)
    ours = o, *attention.backward(pieces, odd, backwards, o, lse, one, deterministic=False, **settings)
    theirs = by_definition(q, k, v, do, **settings)
    assert all(error(to_numpy(a), b) < TOLERANCE["fp16"] for a, b in zip(ours, (theirs[0], *theirs[2:]), strict=True))


def test_an_out_that_cannot_be_reached_is_refused(world):
    q, k, v, do = map(world.xp.asarray, arguments(1, 1, 1, 8, 8, 32, "fp16"))
    o, lse = attention.forward(q, k, v, **full({}, 32))
    pieces = world.xp.empty((1, 1, 32, 8), np.float16).swapaxes(-1, -2)
    with pytest.raises(ValueError, match="addresses that 16 divides"):
        attention.backward(q, k, v, o, lse, do, deterministic=False, out=(pieces, k, v), **full({}, 32))


# ---- as ops


@pytest.mark.parametrize("op, more", [(ops.attention, {}), (ops.tiled_attention, dict(block=16))])
def test_takes_the_place_of_its_ops(world, op, more, monkeypatch):
    launched, start = [], attention.launch
    monkeypatch.setattr(attention, "launch", lambda *arguments, **macros: launched.append(arguments[2]) or start(*arguments, **macros))
    host = arguments(1, 2, 1, 40, 40, 64, "bf16")
    q, k, v = (Tensor(world.xp.asarray(x), requires_grad=True) for x in host[:3])
    do = world.xp.asarray(host[3])
    with world.forbidden():
        o = op(q, k, v, window=9, **more)
        o.backward(do)
    assert launched == ["attention_forward", "attention_statistics", "attention_backward_keys", "attention_convert"]
    theirs = by_definition(*host, **full(dict(window=9), 64))
    for ours, b in zip((o.data, q.grad, k.grad, v.grad), (theirs[0], *theirs[2:]), strict=True):
        assert error(to_numpy(ours), b) < TOLERANCE["bf16"]


def test_obeys_the_setting_of_the_process(world, monkeypatch):
    launched = []
    monkeypatch.setattr(attention, "_launch", lambda file, name, *arguments, **settings: launched.append(name))
    q, k, v, do = map(world.xp.asarray, arguments(1, 1, 1, 4, 4, 32, "fp16"))
    assert not deterministic()
    try:
        deterministic(True)
        attention.attention(q, k, v)[1](do)
    finally:
        deterministic(False)
    assert launched[-1] == "attention_backward_queries"


def test_leaves_the_rest_to_the_op(world):
    xp, (q, k, v, _) = world.xp, arguments(1, 2, 1, 8, 8, 32, "fp16")
    q, k, v = map(xp.asarray, (q, k, v))
    wide = [x.astype(np.float32) for x in (q, k, v)]
    narrow = [x[..., :16] for x in (q, k, v)]
    for arrays, more, settings in [
        (wide, (), {}), ((q, k, wide[2]), (), {}), (narrow, (), {}), ((q, k, narrow[2]), (), {}), ((q[:, :1], xp.concatenate([k, k], 1), v), (), {}),
        ((q, k, v), (xp.ones((1, 8), bool),), {}), ((q, k, v), (None, xp.zeros((1, 8), int)), {}),
        ((q, k, v), (None, np.arange(8)[None] % 2), {}), ((q[:, :, 1:], k, v), (None, np.zeros((1, 8), int)), dict(offset=1)),
        ((q, k, v), (None, None, xp.ones(2, np.float32)), {}), ((q, k, v), (), dict(softcap=5.0)), ((q, k, v), (), dict(scale=-1.0)),
    ]:  # fmt: skip
        assert attention.attention(*arrays, *more, **settings) is NotImplemented
        assert attention.tiled_attention(*arrays, *more, **settings) is NotImplemented


# ---- what only the emulator can say


@pytest.mark.cuda_on_cpu
def test_bitwise_the_same_in_every_order_of_threads(fake):
    arrays, settings = arguments(1, 4, 2, 140, 140, 32, "bf16"), full(dict(window=100), 32)
    in_every_order(lambda: by_kernel(fake.xp, *arrays, exact=True, **settings))
    in_every_order(lambda: by_kernel(fake.xp, *arrays, exact=False, **settings)[3:])  # dk and dv in any case


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("width", attention.TILES)
def test_no_bank_conflict_and_no_sector_wasted(fake, width):
    arrays, settings = arguments(1, 1, 1, 130, 130, width, "fp16"), full({}, width)
    for exact in (False, True):
        moved = traffic(lambda exact=exact: by_kernel(fake.xp, *arrays, exact=exact, **settings))
        assert moved.beyond_ideal("shared") == 0, str(moved)
        assert not [line for line in moved.lines if line.memory == "global" and line.units > 1.02 * line.ideal], str(moved)


MISTAKES = {  # what is in the source, and what somebody might have written
    "no barrier before the next tile": ("attention", "copy_wait<0>();\n        __syncthreads();", "copy_wait<0>();"),
    "no wait for the tile": ("attention", "copy_wait<0>();\n        __syncthreads();", "__syncthreads();"),
    "one buffer": ("attention", "keys + tile % 2 * KEY_TILE * HEAD_WIDTH, k,", "keys, k,"),
    "scores unscaled": ("attention", "running_softmax(s, sum, top, total, scale * LOG2_E)", "running_softmax(s, sum, top, total, LOG2_E)"),
    "o not shrunk": ("attention", "o[m][n][i] *= shrink", "o[m][n][i] *= 1.0f"),
    "one key too many": ("attention", "key <= query + offset + ahead &&", "key <= query + offset + ahead + 1 &&"),
    "keys' end": ("attention", "&& key < keys;", ";"),
    "documents see each other": ("attention", "(!DOCUMENTS || begin(key) == begin(query)) &&", ""),
    "a document too few": ("attention_backward", "last_key < begin(query));", "last_key <= begin(query));"),
    "another row's documents": ("attention", "documents + 2 * b * tiles * QUERY_ROWS}", "documents}"),
    "last tile left out": ("attention", "(high + tile - 1) / tile}", "high / tile}"),
    "rows not turned": ("attention", "row >> 1 & 3 : row & 7)", "row & 3 : row & 7)"),
    "queries overwritten": ("attention", "writes\n    __syncthreads();", "writes\n"),
    "no barrier before dq": ("attention_backward", "            __syncthreads();      // ds is here", ""),
    "no barrier before the results": ("attention_backward", "    __syncthreads();      // all have done with the keys", ""),
    "dk unscaled": ("attention_backward", "each(dk_sum, [&](float& x, int, int, int) { x *= scale; });", ""),
    "delta left out": ("attention_backward", "x *= dp[m][n][i] - lse[QUERY_TILE + 8 * n + i % 2]", "x *= dp[m][n][i]"),
    "heads that share": ("attention_backward", "q + h * q_head", "q"),
    "hidden strips add to dq": ("attention_backward", "                set_to_zero(p);\n", ""),
}  # fmt: skip


TELLING = [(1, 2, 1, 200, 200, 32, {}), (1, 1, 1, 200, 200, 32, dict(window=40)), (1, 1, 1, 40, 70, 32, dict(causal=False)),
           (1, 1, 1, 20, 70, 32, dict(window=3, offset=300)), (2, 1, 1, 150, 150, 32, dict(documents=in_rows(2, 150, 6)))]  # fmt: skip


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(fake, mistake, monkeypatch):
    file, right, wrong = MISTAKES[mistake]
    source = launch.source
    assert right in source(file)
    monkeypatch.setattr(launch, "source", lambda name: source(name).replace(right, wrong) if name == file else source(name))
    with monkeypatch.context() as patch:  # what is compiled in here is forgotten
        for cached in ("function", "_module"):
            patch.setattr(launch, cached, functools.cache(getattr(launch, cached).__wrapped__))
        with pytest.raises((AssertionError, CudaError)) as seen:
            for *shape, settings in TELLING:
                check(fake, arguments(*shape, "fp16"), "fp16", **full(settings, shape[-1]))
    assert "g++ found errors" not in str(seen.value)
