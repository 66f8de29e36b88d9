"""Products on the device, of every shape, layout and format, against float64 NumPy: on the fake device, and on a GPU."""
import itertools

import numpy as np
import pytest

from tinyllm import Tensor, ops
from tinyllm.kernels.cuda import cublaslt, linear

FORMATS = ("float32", "float16", "bfloat16")
DIGITS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next number
SIZES = ((1, 1, 1), (3, 5, 7), (16, 8, 24), (1, 17, 129), (129, 1, 3), (17, 129, 1), (64, 40, 8))  # n, k, m


def sizes(world):
    return world.size(SIZES, (*SIZES, (1000, 769, 515), (2048, 3072, 768)))


def numbers(world, shape, dtype, seed=0, scale=1.0):
    """Random numbers of a format on the device, and the same in float64."""
    x = world.xp.asarray((np.random.default_rng([seed, *shape]).normal(size=shape) * scale).astype(np.float32)).astype(dtype)
    return x, host(x)


def host(x):
    return x.get().astype(np.float64)


def lying(xp, x, how):
    """A copy of x with other strides."""
    if how == "rows":
        return x.copy()
    if how == "columns":
        return x.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    if how == "apart":  # rows of a wider matrix, at an address that is not a multiple of 16
        wide = xp.zeros((*x.shape[:-1], x.shape[-1] + 5), dtype=x.dtype)
        wide[..., 3:-2] = x
        return wide[..., 3:-2]
    spread = xp.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)  # "spread": every other number
    spread[..., ::2] = x
    return spread[..., ::2]


LAYOUTS = ("rows", "columns", "apart", "spread")


def assert_close(y, want, magnitude, dtype, what=""):
    """y within the rounding of its format of `want`; magnitude : of what was summed up in fp32, a·b of the absolute values, say."""
    allowed = 2 * DIGITS[dtype] * np.abs(want) + 2e-6 * magnitude + 1e-7
    error = np.abs(host(y) - want)
    assert y.dtype.name == dtype and y.shape == want.shape, what
    assert np.all(error <= allowed), f"{what}: {error.max()} where {allowed.flat[error.argmax()]} is allowed"


@pytest.mark.parametrize("dtype", FORMATS)
def test_products_of_every_size_and_layout(world, dtype):
    for n, k, m in sizes(world):
        a, a64 = numbers(world, (n, k), dtype)
        b, b64 = numbers(world, (k, m), dtype, 1)
        for first, second in itertools.product(LAYOUTS, LAYOUTS):
            y = linear.times(lying(world.xp, a, first), lying(world.xp, b, second))
            assert_close(y, a64 @ b64, abs(a64) @ abs(b64), dtype, f"{n, k, m} {first} {second}")
            assert y.flags.c_contiguous


@pytest.mark.parametrize("dtype", FORMATS)
def test_products_into_an_array(world, dtype):
    """alpha, beta, every layout of the result, and an fp32 result of 16-bit factors; where beta is 0, what was there is not read."""
    for (n, k, m), how, into in itertools.product(sizes(world)[:4], LAYOUTS, {dtype, "float32"}):
        a, a64 = numbers(world, (n, k), dtype)
        b, b64 = numbers(world, (k, m), dtype, 1)
        before, before64 = numbers(world, (n, m), into, 2)
        for alpha, beta in ((1.0, 0.0), (1.0, 1.0), (-0.5, 0.25)):
            out = lying(world.xp, before if beta else before * world.xp.asarray(np.float32("nan")).astype(into), how)
            assert linear.times(a, b, out, alpha=alpha, beta=beta) is out
            want, magnitude = alpha * a64 @ b64 + beta * before64, abs(a64) @ abs(b64) + abs(before64)
            assert_close(out, want, magnitude, into, f"{n, k, m} {how} {alpha} {beta}")


def test_an_fp32_result_keeps_what_16_bits_would_lose(world):
    ones = world.xp.ones((1, 4096 + 1), dtype=np.float16)
    assert host(linear.times(ones, ones.T, dtype=np.float32)) == 4097  # the next fp16 after 4096 is 4100
    assert host(linear.times(ones, ones.T)) == 4096


def test_values_beyond_fp16_become_infinity(world):
    big = world.xp.full((2, 3), 300, dtype=np.float16)
    assert host(linear.times(big, -big.T)).tolist() == [[-np.inf] * 2] * 2
    assert host(linear.times(big, big.T, dtype=np.float32)).tolist() == [[270000.0] * 2] * 2


def heads(xp, x):
    """(B, H, T, D) lying as (B, T, H, D)."""
    return xp.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


BATCHES = {
    "equal": ((4, 3, 5), (4, 5, 6)),
    "one": ((1, 3, 5), (1, 5, 6)),
    "two axes": ((2, 3, 4, 5), (2, 3, 5, 6)),
    "one matrix for all": ((2, 3, 4, 5), (5, 6)),
    "one first factor for all": ((4, 5), (3, 2, 5, 6)),
    "both broadcast": ((2, 1, 3, 4), (5, 4, 2)),
    "one of a kind": ((1, 3, 4), (5, 4, 2)),
    "wide": ((3, 16, 8), (3, 8, 32)),
}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("case", BATCHES)
def test_batches(world, dtype, case):
    (a, a64), (b, b64) = (numbers(world, shape, dtype, seed) for seed, shape in enumerate(BATCHES[case]))
    want, magnitude = a64 @ b64, abs(a64) @ abs(b64)
    for first, second in itertools.product(LAYOUTS, LAYOUTS):
        y = linear.times(lying(world.xp, a, first), lying(world.xp, b, second))
        assert_close(y, want, magnitude, dtype, f"{first} {second}")
    for how in LAYOUTS:
        out = lying(world.xp, world.xp.ones(want.shape, dtype=dtype), how)
        linear.times(a, b, out, beta=1.0)
        assert_close(out, want + 1, magnitude + 1, dtype, f"into {how}")


@pytest.mark.parametrize("dtype", FORMATS)
def test_heads_that_lie_between_positions(world, dtype):
    (q, q64), (k, k64) = (numbers(world, (2, 3, 7, 8), dtype, seed) for seed in (0, 1))
    q, k = heads(world.xp, q), heads(world.xp, k)
    assert_close(linear.times(q, k.swapaxes(-1, -2)), q64 @ k64.swapaxes(-1, -2), abs(q64) @ abs(k64).swapaxes(-1, -2), dtype)
    scores, scores64 = numbers(world, (2, 3, 7, 7), dtype, 2)
    out = heads(world.xp, world.xp.zeros((2, 3, 7, 8), dtype=dtype))
    linear.times(scores, k, out)
    assert_close(out, scores64 @ k64, abs(scores64) @ abs(k64), dtype)
    few = world.xp.stack([q, k])[:, :, :, :5][1]  # the first positions of a cache
    few64 = k64[:, :, :5].swapaxes(-1, -2)
    assert_close(linear.times(q, few.swapaxes(-1, -2)), q64 @ few64, abs(q64) @ abs(few64), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
def test_matrices_whose_rows_overlap(world, dtype):
    """Broadcast ones, of which all rows (or columns) are one."""
    (row, row64), (b, b64) = numbers(world, (8,), dtype), numbers(world, (8, 6), dtype, 1)
    rows, column = world.xp.broadcast_to(row, (5, 8)), world.xp.broadcast_to(row[:5, None], (5, 8))
    want = np.broadcast_to(row64, (5, 8)) @ b64
    assert_close(linear.times(rows, b), want, abs(rows.get()) @ abs(b64), dtype)
    assert_close(linear.times(b.T, rows.T), want.T, abs(b64.T) @ abs(rows.get().T), dtype)
    assert_close(linear.times(column, b), np.broadcast_to(row64[:5, None], (5, 8)) @ b64, abs(column.get()) @ abs(b64), dtype)


def test_operands_are_read_where_they_lie(world, monkeypatch):
    """No copy is made of what has a leading dimension and evenly spaced matrices; the library gets the addresses themselves."""
    xp, got = world.xp, []
    matmul = cublaslt.matmul
    monkeypatch.setattr(cublaslt, "matmul", lambda a, b, out, **settings: got.append([a, b, out]) or matmul(a, b, out, **settings))
    x = xp.zeros((4, 6, 10, 8), dtype=np.float16)
    square = xp.zeros((8, 8), dtype=np.float16)
    for a, b, out, products in (
        (x[0, 0], square.T, None, 1),  # transposed
        (x[0, 0, :, :4], square[2:6, 1:], None, 1),  # parts
        (x, square, None, 1),  # many rows by one matrix
        (x[0, :, -1:], square, None, 1),  # last positions by one matrix
        (x[0, :, :5], square, None, 6),  # first positions: rows are not evenly apart, matrices are
        (x[:, :, :5], x[:, :, :7].swapaxes(-1, -2), None, 24),  # queries and a cache
        (x[0, 0], x[0].swapaxes(-1, -2), None, 6),  # one for all
        (x[0], square, xp.zeros((6, 10, 16), dtype=np.float16)[..., 8:], 1),  # into a part
        (x[0].swapaxes(0, 1), square, None, 10),  # heads between positions
    ):
        y = linear.times(a, b, out)
        (a2, b2, out2), (a3, b3, out3) = got.pop(), (a, b, y)
        assert [x2.data.ptr for x2 in (a2, b2, out2)] == [x3.data.ptr for x3 in (a3, b3, out3)]
        assert all(cublaslt.matrix(x2) is not None for x2 in (a2, b2, out2))
        assert (out2.shape[0] if out2.ndim == 3 else 1) == products
    w = xp.zeros((5, 8), dtype=np.float16)
    linear.linear_forward(x[0, 0], w, out=xp.zeros((5, 10), dtype=np.float16).T)  # computed as its transpose
    assert got.pop()[0].data.ptr == w.data.ptr


def test_nothing_to_multiply(world):
    xp = world.xp
    for dtype, (n, k, m) in itertools.product(FORMATS, ((0, 4, 5), (3, 4, 0), (0, 0, 0))):
        assert linear.times(xp.ones((n, k), dtype=dtype), xp.ones((k, m), dtype=dtype)).shape == (n, m)
    assert linear.times(xp.ones((0, 2, 3)).astype(np.float32), xp.ones((0, 3, 4)).astype(np.float32)).shape == (0, 2, 4)
    a, b = xp.ones((3, 0), dtype=np.float32), xp.ones((0, 2), dtype=np.float32)
    assert host(linear.times(a, b)).tolist() == [[0, 0]] * 3
    out = xp.full((3, 2), 4, dtype=np.float32)
    assert host(linear.times(a, b, out, beta=0.5)).tolist() == [[2, 2]] * 3
    assert host(linear.times(a, b, xp.full((3, 2), np.nan, dtype=np.float32))).tolist() == [[0, 0]] * 3
    bias = xp.ones(2, dtype=np.float32)
    assert host(linear.linear_forward(a, xp.ones((2, 0), dtype=np.float32), bias)).tolist() == [[1, 1]] * 3
    assert [y.shape for y in linear.gelu_linear(xp.ones((0, 4), dtype=np.float32), xp.ones((8, 4), dtype=np.float32))] == [(0, 8)] * 2


def gelu(x):
    y, backward = ops.gelu_tanh.array(x)
    return y, backward(np.ones_like(x))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "none"))
def test_biases_and_gelu_on_the_way_out(world, dtype, bias):
    """F = 8·n goes through epilogues, other F through kernels of their own."""
    for n, k, f in sizes(world):
        x, x64 = numbers(world, (n, k), dtype)
        w, w64 = numbers(world, (f, k), dtype, 1)
        b, b64 = numbers(world, (f,), "float32", 2) if bias else (None, np.zeros(f))
        if bias:
            b64 = host(b.astype(dtype))
        inner, magnitude = x64 @ w64.T + b64, abs(x64) @ abs(w64).T + abs(b64)
        assert_close(linear.linear_forward(x, w, b), inner, magnitude, dtype)
        out = lying(world.xp, world.xp.zeros((n, f), dtype=dtype), "apart")
        assert_close(linear.linear_forward(x, lying(world.xp, w, "columns"), b, out), inner, magnitude, dtype)
        active, pre = linear.gelu_linear(x, w, b)
        assert_close(pre, inner, magnitude, dtype)
        assert_close(active, gelu(inner)[0], magnitude * (1 + DIGITS[dtype] / 1e-6), dtype)  # may be made from pre, which is rounded
        dy, dy64 = numbers(world, (n, k), dtype, 3)
        back, back64 = numbers(world, (k, f), dtype, 4)
        slope = gelu(host(pre))[1]
        want, magnitude = dy64 @ back64, abs(dy64) @ abs(back64)
        assert_close(linear.gelu_backward_times(dy, back, pre), want * slope, magnitude * (1 + DIGITS[dtype] / 1e-6), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_gradient_of_weights_is_written_or_added_in_fp32(world, dtype):
    for n, k, m in sizes(world):
        dy, dy64 = numbers(world, (n, 2 * m), dtype)
        x, x64 = numbers(world, (n, k), dtype, 1)
        dy, dy64 = dy[:, m:], dy64[:, m:]  # part of a wider gradient, as of q, k and v in one
        out = world.xp.full((m, k), np.nan, dtype=np.float32)
        gradient, magnitude = linear.weight_gradient(dy, x), abs(dy64).T @ abs(x64)
        gradient.write(out)
        assert_close(out, dy64.T @ x64, magnitude, "float32")
        gradient.add(out)
        assert_close(out, 2 * dy64.T @ x64, 2 * magnitude, "float32")
        assert_close(linear.column_sums(dy), dy64.sum(0), abs(dy64).sum(0), "float32")


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("weights", ("float32", None), ids=("fp32 weights", "alike"))
def test_linear_with_its_gradients(world, dtype, weights):
    for shape, m in (((5, 7), 3), ((2, 3, 8), 16), ((7,), 4), ((2, 0, 3), 4)):
        x, x64 = numbers(world, shape, dtype)
        w, _ = numbers(world, (m, shape[-1]), weights or dtype, 1)
        b, _ = numbers(world, (m,), weights or dtype, 2)
        w64, b64 = host(w.astype(dtype)), host(b.astype(dtype))
        inputs = [Tensor(array, requires_grad=True) for array in (x, w, b)]
        for _ in range(2):
            y = ops.linear(*inputs)
            dy, dy64 = numbers(world, y.shape, dtype, 3)
            y.backward(dy)
        rows, dy64 = x64.reshape(-1, shape[-1]), dy64.reshape(-1, m)
        assert_close(y.data, x64 @ w64.T + b64, abs(x64) @ abs(w64).T + abs(b64), dtype)
        wants = ((dy64 @ w64).reshape(shape), dy64.T @ rows, dy64.sum(0))
        magnitudes = ((abs(dy64) @ abs(w64)).reshape(shape), abs(dy64).T @ abs(rows), abs(dy64).sum(0))
        for tensor, want, magnitude in zip(inputs, wants, magnitudes, strict=True):
            name = tensor.dtype.name
            assert_close(tensor.grad, 2 * want, magnitude * (2 + DIGITS[name] / 1e-6), name)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("case", (*BATCHES.values(), ((3, 4), (4,)), ((4,), (2, 4, 3)), ((4,), (4,))), ids=str)
def test_matmul_with_its_gradients(world, dtype, case):
    arrays = [numbers(world, shape, dtype, seed) for seed, shape in enumerate(case)]
    inputs = [Tensor(x, requires_grad=True) for x, _ in arrays]
    y = inputs[0] @ inputs[1]
    exact = [Tensor(x64, requires_grad=True) for _, x64 in arrays]
    y64 = exact[0] @ exact[1]
    dy, dy64 = numbers(world, y.shape, dtype, 2) if y.shape else (world.xp.asarray(np.float32(0.5)).astype(dtype), np.float64(0.5))
    y.backward(dy)
    y64.backward(dy64)
    assert_close(y.data, y64.data, 10 * np.ones(y.shape), dtype)
    for tensor, want in zip(inputs, exact, strict=True):
        assert_close(tensor.grad, want.grad, 30 * np.ones(tensor.shape), dtype)


def test_mixed_formats_are_multiplied_in_16_bits(world):
    half, half64 = numbers(world, (3, 4), "float16")
    full, _ = numbers(world, (4, 5), "float32", 1)
    rounded = host(full.astype(np.float16))
    assert_close(linear.times(half, full), half64 @ rounded, abs(half64) @ abs(rounded), "float16")
    assert_close(linear.times(full.T, half.T), (half64 @ rounded).T, (abs(half64) @ abs(rounded)).T, "float16")


def test_bad_arguments_are_named_in_one_line(world):
    a = world.xp.ones((3, 4), dtype=np.float32)
    for call, kind, words in (
        (lambda: linear.times(a, a), ValueError, "(3, 4) and (3, 4)"),
        (lambda: linear.times(a, a.T, world.xp.ones((3, 4), dtype=np.float32)), ValueError, "into (3, 4)"),
        (lambda: linear.times(a, a.T.astype(np.float64)), TypeError, "float64"),
        (lambda: linear.times(a, a.T, dtype=np.float16), TypeError, "float16"),
        (lambda: linear.times(a[None][[0, 0]], a.T[None][[0, 0, 0]]), ValueError, "broadcast"),
        (lambda: cublaslt.matmul(a, a.T, world.xp.ones((3, 6), dtype=np.float32)[:, ::2]), ValueError, "rows that are not contiguous"),
    ):
        with pytest.raises(kind) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value)


def test_float64_is_left_to_the_op(world):
    x, w = (world.xp.ones(shape, dtype=np.float64) for shape in ((3, 4), (2, 4)))
    assert linear.linear(x, w) is NotImplemented and linear.matmul(x, w.T) is NotImplemented
    assert host(ops.linear(Tensor(x), Tensor(w)).data).tolist() == [[4, 4]] * 3


def test_products_are_captured_in_a_graph(world):
    """A product that was made once neither asks nor allocates when it is captured; the graph repeats it with what is in its arrays then."""
    xp = world.xp
    (x, _), (w, _), (b, _) = (numbers(world, shape, "bfloat16", seed) for seed, shape in enumerate(((4, 16), (8, 16), (8,))))
    out = xp.zeros((4, 8), dtype=x.dtype)
    stream = xp.cuda.Stream(non_blocking=True)
    xp.cuda.get_current_stream().synchronize()
    with stream:
        linear.linear_forward(x, w, b, out)
        stream.begin_capture()
        linear.linear_forward(x, w, b, out)
        graph = stream.end_capture()
        for scale in (1, 3):
            x *= scale
            out.fill(0)
            graph.launch(stream)
            stream.synchronize()
            inner = host(x) @ host(w).T + host(b)
            assert_close(out, inner, abs(host(x)) @ abs(host(w)).T + abs(host(b)), "bfloat16")
