"""Ops at the edges: empty and single, huge and infinite, not contiguous, float32 throughout, everything ignored, ids out of range."""
import tracemalloc
import warnings

import numpy as np
import pytest
from by_definition import plain_ops

from tinyllm import ops
from tinyllm.ops.cases import CASES
from tinyllm.tensor import OPS, Tensor

HUGE = np.float32(1e30)


@pytest.fixture(autouse=True)
def no_warnings():
    """A warning at an edge is a NaN or an overflow that somebody will have to look for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(function, *arrays, dtype=np.float32, **settings):
    """[y, gradient of each array …] for arrays of numbers, with an upstream gradient of ones."""
    tensors = [Tensor(np.asarray(x, dtype), requires_grad=True) for x in arrays]
    y = function(*tensors, **settings)
    y.backward(np.ones(y.shape))
    return [y.data, *(t.grad for t in tensors)]


def finite(*arrays):
    return all(np.isfinite(a).all() for a in arrays)


# float32 stays float32.


def in_float32(x):
    """Float arrays and constant Tensors of a case as float32."""
    if isinstance(x, Tensor):
        return Tensor(x.data.astype(np.float32))
    return x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.label}")
def test_float32_in_float32_out(case):
    """Also inside: the engine would round a float64 gradient back, but only after it was computed at half the speed."""
    arguments = [in_float32(x) for x in case.arrays()]
    arrays = [x.data if isinstance(x, Tensor) else x for x in arguments]
    settings = {k: v() if callable(v) else v for k, v in case.settings.items()}
    y, backward = OPS[case.op].array(*arrays, **settings)
    y = np.asarray(y)
    assert y.dtype == np.float32
    gradients = backward(case.upstream(y.shape).astype(np.float32))
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for x, dx in zip(arrays, gradients, strict=False):  # inputs left out have gradients too, None
        if isinstance(x, np.ndarray) and x.dtype == np.float32 and dx is not None:
            dx = dx() if callable(dx) else dx
            assert dx.dtype == np.float32
    reference, _ = OPS[case.op].array(*[x.astype(np.float64) if hasattr(x, "dtype") and x.dtype == np.float32 else x for x in arrays], **{
        k: v() if callable(v) else v for k, v in case.settings.items()})  # fmt: skip
    assert np.allclose(y, reference, rtol=1e-5, atol=1e-5)


def test_float32_survives_float64_companions():
    """Arrays that NumPy makes in float64, or in integers, where nobody asks for more digits."""
    z = Tensor(np.zeros((2, 3), np.float32), True)
    assert ops.cross_entropy(z, np.array([0, 1]), np.array([1.0, 2.0])).dtype == np.float32
    assert ops.linear_cross_entropy(z, Tensor(np.zeros((4, 3), np.float32)), np.array([0, 1]), np.array([1.0, 2.0])).dtype == np.float32
    assert ops.binary_cross_entropy(z, np.array([[0, 1, 0], [1, 0, 1]])).dtype == np.float32
    assert ops.where(np.array([True, False, True]), z, 0.0).dtype == np.float32
    q = Tensor(np.zeros((1, 2, 3, 4), np.float32))
    for function in (ops.attention, ops.tiled_attention):
        assert function(q, q, q, None, None, ops.alibi_slopes(2)).dtype == np.float32
    cos, sin = ops.rope_table(np.arange(3), ops.rope_frequencies(4)[0])
    assert ops.rope(q, cos, sin).dtype == np.float32


# Not contiguous, empty, single.


def test_memory_order_does_not_matter():
    for case in CASES:
        arguments = case.arrays()
        strided = [_scattered(x) for x in arguments]
        plain, other = (run_case(case, a) for a in (arguments, strided))
        for a, b in zip(plain, other, strict=True):
            assert a.shape == b.shape and np.allclose(a, b, rtol=1e-12, atol=1e-14), case


def _scattered(x):
    """The same values, in memory the other way round and two elements apart."""
    if not isinstance(x, np.ndarray):
        return x
    wide = np.zeros([2 * n for n in reversed(x.shape)], x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)].T
    view[...] = x
    return view


def run_case(case, arguments):
    tensors = [Tensor(x, x.dtype.kind == "f") if isinstance(x, np.ndarray) else x for x in arguments]
    y = case.function(*tensors)
    y.backward(case.upstream(y.shape))
    return [y.data, *(x.grad for x in tensors if isinstance(x, Tensor) and x.requires_grad)]


EMPTY = {
    "elementwise": (lambda x: ops.gelu(ops.exp(x) * 2.0 + x), (0, 4)),
    "softmax": (ops.softmax, (0, 4)),
    "log_softmax": (ops.log_softmax, (2, 0, 4)),
    "logsumexp": (ops.logsumexp, (0, 4)),
    "sum": (ops.sum, (0, 4)),
    "max over the other axis": (lambda x: ops.max(x, axis=-1), (0, 4)),
    "layernorm": (ops.layernorm, (0, 4)),
    "rmsnorm": (ops.rmsnorm, (0, 4)),
    "linear": (lambda x: ops.linear(x, Tensor(np.ones((3, 4)), True), Tensor(np.ones(3), True)), (2, 0, 4)),
    "matmul": (lambda x: x @ Tensor(np.ones((4, 3)), True), (0, 4)),
    "einsum": (lambda x: ops.einsum(x, Tensor(np.ones((4, 3)), True), subscripts="ij,jk->ik"), (0, 4)),
    "reshape": (lambda x: ops.reshape(x, shape=(0, 2, 2)), (0, 4)),
    "concatenate": (lambda x: ops.concatenate(x, Tensor(np.ones((2, 4)))), (0, 4)),
    "getitem": (lambda x: x[np.array([], int)], (5, 4)),
    "empty slice": (lambda x: x[2:2], (5, 4)),
    "dropout": (lambda x: ops.dropout(x, rate=0.5, rng=np.random.default_rng(0)), (0, 4)),
    "embedding": (lambda x: ops.embedding(x, np.zeros((2, 0), int)), (5, 4)),
    "rope": (lambda x: ops.rope(x, np.ones((0, 2)), np.zeros((0, 2))), (1, 2, 0, 4)),
    "attention, no batch": (lambda x: ops.attention(x, x, x), (0, 2, 3, 4)),
    "tiled attention, no batch": (lambda x: ops.tiled_attention(x, x, x), (0, 2, 3, 4)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_goes_through(name):
    function, shape = EMPTY[name]
    x = Tensor(np.ones(shape), requires_grad=True)
    y = function(x)
    y.backward(np.ones(y.shape))
    assert x.grad.shape == shape and (x.grad == 0).all()


def test_single_elements():
    one = np.full((1, 1), 3.0)
    y, dx = run(ops.softmax, one, dtype=np.float64)
    assert y.item() == 1 and dx.item() == 0
    y, dx = run(ops.layernorm, one, dtype=np.float64)
    assert y.item() == 0 and dx.item() == 0
    y, dx = run(ops.logsumexp, one, dtype=np.float64)
    assert y.item() == 3 and dx.item() == 1
    y, dx = run(ops.var, one, dtype=np.float64)
    assert y == 0 and dx.item() == 0
    for function in (ops.sum, ops.mean, ops.max, ops.min):
        y, dx = run(function, np.array(3.0), dtype=np.float64)
        assert y == 3 and dx == 1 and dx.shape == ()


def test_ties_share_the_gradient():
    assert run(ops.max, [2.0, 2.0, 1.0, 2.0])[1].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert run(ops.min, [[1.0, 1.0], [3.0, 2.0]], axis=1)[1].tolist() == [[0.5, 0.5], [0, 1]]
    for function in (ops.maximum, ops.minimum):
        y, da, db = run(function, [1.0, 5.0, -np.inf, np.inf], [1.0, 2.0, -np.inf, np.inf])
        assert np.array_equal(y, function.array(np.array([1, 5, -np.inf, np.inf]), np.array([1, 2, -np.inf, np.inf]))[0])
        assert da.tolist() == [0.5, float(function is ops.maximum), 0.5, 0.5] and np.array_equal(da + db, np.ones(4))


def test_corners():
    assert run(ops.abs, [-2.0, 0.0, 3.0])[1].tolist() == [-1, 0, 1]
    assert run(ops.relu, [-np.inf, -1.0, 0.0, 2.0, np.inf])[0].tolist() == [0, 0, 0, 2, np.inf]
    assert run(ops.relu, [-np.inf, -1.0, 0.0, 2.0, np.inf])[1].tolist() == [0, 0, 0, 1, 1]
    assert run(ops.relu2, [-np.inf, -1.0, 0.0, 2.0])[0].tolist() == [0, 0, 0, 4]
    assert run(ops.clip, [-2.0, -1.0, 0.0, 1.0, 2.0], low=-1, high=1)[1].tolist() == [0, 1, 1, 1, 0]
    for exponent, gradient in [(0, 0.0), (1, 1.0), (2, 0.0), (3, 0.0)]:
        assert run(ops.pow, [0.0], exponent=exponent)[1].tolist() == [gradient]


@pytest.mark.parametrize("kind", [bool, int, float])
def test_conditions_may_be_numbers(kind):
    condition = np.array([1, 0, 1]).astype(kind)
    y, da, db = run(lambda a, b: ops.where(condition, a, b), [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert y.tolist() == [1, 5, 3] and da.tolist() == [1, 0, 1] and db.tolist() == [0, 1, 0]
    y, dx = run(lambda x: ops.masked_fill(x, condition, value=-np.inf), [1.0, 2.0, 3.0])
    assert y.tolist() == [-np.inf, 2, -np.inf] and dx.tolist() == [0, 1, 0]


# Huge values, in float32, whose largest number is 3.4e38.


def test_huge_scores_overflow_nowhere():
    z = np.array([[HUGE, -HUGE, 0.0], [HUGE, HUGE, 0.0], [-HUGE, -HUGE, -HUGE]])
    for function in (ops.softmax, ops.log_softmax, ops.logsumexp):
        y, dz = run(function, z)
        assert finite(y, dz), function
    assert run(ops.softmax, z)[0].tolist() == [[1, 0, 0], [0.5, 0.5, 0], pytest.approx([1 / 3] * 3)]
    y, dz = run(lambda z: ops.cross_entropy(z, np.array([1, 0, 2])), z)
    assert finite(y, dz) and y == pytest.approx(2e30 / 3)
    assert np.allclose(dz * 3, [[1, -1, 0], [-0.5, 0.5, 0], [1 / 3, 1 / 3, -2 / 3]])
    y, dx, dw = run(lambda x, w: ops.linear_cross_entropy(x, w, np.array([1, 0, 2])), z, np.eye(3))
    assert finite(y, dx, dw) and y == pytest.approx(2e30 / 3)


def test_huge_arguments_of_saturating_functions():
    x = np.array([HUGE, -HUGE, 500.0, -500.0])
    assert run(ops.sigmoid, x)[0].tolist() == [1, 0, 1, 0] and finite(*run(ops.sigmoid, x))
    assert run(ops.tanh, x)[0].tolist() == [1, -1, 1, -1] and finite(*run(ops.tanh, x))
    assert run(ops.erf, np.array([100.0, -100.0]))[0].tolist() == [1, -1]
    y, dz, dt = run(ops.binary_cross_entropy, x, [0.0, 1.0, 1.0, 0.0])
    assert finite(y, dz, dt) and y == pytest.approx(0.5e30)
    assert run(ops.silu, x)[0].tolist() == [HUGE, 0, 500, 0]


def test_infinite_scores_hide():
    """-inf is how a score is switched off."""
    z = np.array([[1.0, -np.inf, 1.0]])
    y, dz = run(ops.softmax, z)
    assert y.tolist() == [[0.5, 0, 0.5]] and finite(dz)
    y, dz = run(ops.logsumexp, [[1.0, -np.inf, 1.0], [-np.inf] * 3], dtype=np.float64)
    assert y.tolist() == [1 + np.log(2), -np.inf] and dz.tolist() == [[0.5, 0, 0.5], [0, 0, 0]]
    y, dz = run(lambda z: ops.cross_entropy(z, np.array([0])), z)
    assert y == pytest.approx(np.log(2)) and dz.tolist() == [[-0.5, 0, 0.5]]
    y, dp, dq = run(ops.kl_divergence, [[np.log(0.5), -np.inf, np.log(0.5)]], [[np.log(0.5), -np.inf, np.log(0.5)]])
    assert y == 0 and finite(dp, dq)


# Losses of which part or all counts nothing.


def linear_form(z, *rest, **settings):
    """linear_cross_entropy with the unit matrix as head: cross_entropy of x itself."""
    return ops.linear_cross_entropy(z, Tensor(np.eye(z.shape[-1], dtype=z.dtype)), *rest, **settings)


@pytest.mark.parametrize("loss", [ops.cross_entropy, linear_form])
@pytest.mark.parametrize("how", ["ignored", "weight 0", "no rows"])
def test_where_nothing_counts_loss_and_gradient_are_0_with_a_warning(loss, how):
    rows = 0 if how == "no rows" else 4
    z = Tensor(np.random.default_rng(0).standard_normal((rows, 5)), requires_grad=True)
    targets = np.full(rows, -1) if how == "ignored" else np.zeros(rows, int)
    with pytest.warns(RuntimeWarning, match="every target is ignored or has weight 0") as caught:
        y = loss(z, targets, np.zeros(rows) if how == "weight 0" else None, label_smoothing=0.1, z_loss=0.1)
    assert caught[0].filename == __file__  # the warning points at the caller
    y.backward()
    assert y.data == 0 and z.grad.shape == (rows, 5) and (z.grad == 0).all()


@pytest.mark.parametrize("loss", [ops.cross_entropy, linear_form])
def test_what_is_ignored_may_be_anything(loss):
    """The loss of a row whose target is ignored does not enter, not even as 0·inf."""
    z = np.random.default_rng(0).standard_normal((4, 5))
    expected, expected_dz = run(lambda z: loss(z, np.array([1, 2, 3])), z[:3], dtype=np.float64)
    z[3] = [-1e308, 1e308, 0, 0, 0]  # the loss of token 0, which stands in for an ignored target, is infinite
    with np.errstate(over="ignore"):
        y, dz = run(lambda z: loss(z, np.array([1, 2, 3, -1])), z, dtype=np.float64)
    assert np.isclose(y, expected, rtol=1e-14) and np.allclose(dz[:3], expected_dz, rtol=1e-13) and (dz[3] == 0).all()


def test_ignored_rows_with_a_masked_vocabulary():
    z = np.array([[-np.inf, 1.0, 2.0], [-np.inf, 3.0, 1.0]])
    y, dz = run(lambda z: ops.cross_entropy(z, np.array([1, -1])), z)
    assert finite(y, dz) and y == pytest.approx(np.log1p(np.e)) and (dz[1] == 0).all()


def test_another_ignore_index():
    z = np.random.default_rng(0).standard_normal((3, 5))
    a = run(lambda z: ops.cross_entropy(z, np.array([1, -100, 2]), ignore_index=-100), z)
    b = run(lambda z: ops.cross_entropy(z, np.array([1, -1, 2])), z)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bad", [5, -2, -100])
def test_targets_outside_the_vocabulary_are_refused(bad):
    """NumPy would count -2 from the end, and the loss would be that of a wrong token."""
    z, w = Tensor(np.zeros((3, 5))), Tensor(np.zeros((5, 5)))
    message = rf"cross-entropy \(ignored targets are -1\): id {bad} is outside the vocabulary of 5 \(1 of 3 ids are\)"
    with pytest.raises(ValueError, match=message):
        ops.cross_entropy(z, np.array([0, bad, -1]))
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(z, w, np.array([0, bad, -1]))


@pytest.mark.parametrize("bad", [6, -1])
def test_ids_outside_the_table_are_refused(bad):
    with pytest.raises(ValueError, match=f"embedding: id {bad} is outside the vocabulary of 6"):
        ops.embedding(Tensor(np.zeros((6, 3))), np.array([[0, 5], [bad, 1]]))


def test_embedding_adds_up_repeated_ids():
    random = np.random.default_rng(0)
    ids, dy = random.integers(0, 7, (20, 30)), random.standard_normal((20, 30, 3))
    w = Tensor(np.zeros((7, 3)), requires_grad=True)
    ops.embedding(w, ids).backward(dy)
    expected = np.zeros((7, 3))
    for i in np.ndindex(ids.shape):
        expected[ids[i]] += dy[i]
    assert np.allclose(w.grad, expected, rtol=1e-12)
    for dtype in (np.uint8, np.uint16, np.int32):
        assert np.array_equal(ops.embedding(w, ids.astype(dtype)).data, ops.embedding(w, ids).data)


# The head that never holds all scores.


@pytest.mark.parametrize("rows", [1, 2, 7, 50, 64, None])
def test_linear_cross_entropy_is_cross_entropy_of_linear(rows):
    random = np.random.default_rng(0)
    x, w = random.standard_normal((5, 10, 6)), random.standard_normal((11, 6))
    targets, weights = random.integers(-1, 11, (5, 10)), random.uniform(0, 2, (5, 10))
    settings = dict(label_smoothing=0.1, z_loss=0.01)
    a = run(lambda x, w: ops.cross_entropy(ops.linear(x, w), targets, weights, **settings), x, w, dtype=np.float64)
    b = run(lambda x, w: ops.linear_cross_entropy(x, w, targets, weights, rows=rows, **settings), x, w, dtype=np.float64)
    assert all(np.allclose(p, q, rtol=1e-12, atol=1e-14) for p, q in zip(a, b, strict=True))


def test_linear_cross_entropy_never_holds_all_scores():
    N, V, C, rows = 2000, 500, 8, 100
    random = np.random.default_rng(0)
    x, w = (Tensor(random.standard_normal(shape, dtype=np.float32), True) for shape in ((N, C), (V, C)))
    targets = random.integers(0, V, N)
    with plain_ops():
        tracemalloc.start()
        try:
            loss = ops.linear_cross_entropy(x, w, targets, rows=rows)
            kept = tracemalloc.get_traced_memory()[0]
            loss.backward()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    scores = N * V * 4
    assert peak < scores / 4  # some slices of rows, and the gradients
    assert kept < scores / 20  # between forward and backward: a number a row


# Errors of shapes and settings.


def test_errors_name_what_is_wrong():
    x = Tensor(np.ones((2, 5)))
    with pytest.raises(ValueError, match="an axis of length 5 cannot be cut into 2 equal parts"):
        ops.split(x, 2)
    for subscripts in ("ij,jk", "ii->i", "...j->j", "ij,jk->ik", "i1->i"):
        with pytest.raises(ValueError, match="einsum: .* does not fit 1 operands; write one term of distinct letters"):
            ops.einsum(x, subscripts=subscripts)
    q = Tensor(np.ones((1, 4, 2, 3)))
    k = Tensor(np.ones((1, 3, 2, 3)))
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key/value heads evenly"):
        ops.attention(q, k, k)


def test_split_gives_back_what_concatenate_joins():
    x = Tensor(np.random.default_rng(0).standard_normal((2, 6)), requires_grad=True)
    parts = ops.split(x, 3)
    assert [p.shape for p in parts] == [(2, 2)] * 3
    y = ops.concatenate(*parts, axis=1)
    assert np.array_equal(y.data, x.data)
    (parts[0] * 2.0 + parts[2]).sum().backward()
    assert x.grad.tolist() == [[2, 2, 0, 0, 1, 1]] * 2
