"""The kernels of rows (norms, activations, RoPE, the embedding's gradient, sums over rows) against the ops in float64.

The same tests run in the emulator, on small arrays of odd sizes, and on a GPU, on large ones.
"""
from contextlib import nullcontext

import numpy as np
import pytest
from device_worlds import entered

from tinyllm import ops
from tinyllm.kernels.cuda import activations, embedding, norms, rope, sums, vectors
from tinyllm.tensor import Tensor

TOLERANCES = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}  # of the largest value: sums in another order; half a unit of the last place
FORMATS = tuple(TOLERANCES)


class Numbers:
    """Draws arrays for a device, and keeps what they hold there in float64 for the op."""

    def __init__(self, world, dtype, seed=0):
        self.xp, self.dtype, self.random = world.xp, np.dtype(dtype), np.random.default_rng(seed)

    def __call__(self, *shape, scale=1.0, shift=0.0, dtype=None):
        host = (self.random.standard_normal(shape) * scale + shift).astype(dtype or self.dtype)
        return self.xp.asarray(host), host.astype(np.float64)


def close(ours, theirs, tolerance):
    ours = ours.get().astype(np.float64)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-30)
    assert error < tolerance, error


def nobody_waits(world):
    return world.xp.forbidden() if world.name == "fake" else nullcontext()


def shapes(world, small, large):
    return world.size(small, [*small, large])


# ---- norms

NORM_CASES = [  # (format, rows, width, LayerNorm); widths: odd, narrow, one warp's vectors, a block's, several pieces for a thread
    ("float32", 9, 129, True), ("float32", 2, 3, False), ("float32", 3, 1100, False), ("float16", 11, 64, False), ("float16", 3, 1030, True),
    ("bfloat16", 7, 768, True), ("bfloat16", 9, 1024, False), ("bfloat16", 2, 2056, True), ("bfloat16", 1, 8191, False),
]  # fmt: skip
LARGE_NORMS = [(dtype, 30001, width, centre) for dtype, width, centre in
               (("bfloat16", 768, True), ("bfloat16", 1024, False), ("float16", 1024, True), ("float32", 1024, True), ("bfloat16", 4096, False))]


def by_op(x, w, b, eps, centre, dy):
    """(y, dx, dw, db) of the op in float64."""
    y, backward = ops.layernorm.array(x, w, b, eps=eps) if centre else ops.rmsnorm.array(x, w, eps=eps)
    return y, *(g() if callable(g) else g for g in backward(dy)), *([] if centre else [None])


def check_norm(world, dtype, rows, width, centre):
    numbers, tolerance = Numbers(world, dtype), TOLERANCES[dtype]
    (x, x64), (dy, dy64) = numbers(rows, width, scale=2, shift=3), numbers(rows, width)
    (w, w64), (b, b64) = numbers(width, dtype="float32"), numbers(width, dtype="float32")
    b, b64 = (b, b64) if centre else (None, None)
    y, statistics = norms.forward(x, w, b, 1e-5, centre)
    dx, dw, db = norms.backward(dy, x, statistics, w, centre)
    expected = by_op(x64, w64, b64, 1e-5, centre, dy64)
    assert y.dtype == dx.dtype == x.dtype and dw.dtype == np.float32
    for ours, theirs in zip((y, dx, dw, db), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs, 2 * tolerance if ours.dtype == x.dtype else 1e-5)


@pytest.mark.parametrize("dtype, rows, width, centre", NORM_CASES)
def test_norm(world, dtype, rows, width, centre):
    check_norm(world, dtype, rows, width, centre)


def test_large_norms(world):
    for case in world.size([], LARGE_NORMS):
        check_norm(world, *case)


@pytest.mark.parametrize("dtype, width, centre", [("float32", 129, True), ("bfloat16", 768, True), ("float16", 64, False)])
def test_norm_with_residual_sums_and_without_gain(world, dtype, width, centre):
    """s is stored in the format, and normalised as stored; what is added to dx is added before rounding."""
    numbers = Numbers(world, dtype)
    (x, _), (plus, _), (dy, dy64), (through, through64) = (numbers(9, width) for _ in range(4))
    y, statistics, s = norms.forward(x, None, None, 1e-5, centre, plus)
    assert (s.get() == (x.get().astype(np.float32) + plus.get().astype(np.float32)).astype(dtype)).all()
    dx, dw, db = norms.backward(dy, s, statistics, None, centre, through)
    expected = by_op(s.get().astype(np.float64), None, None, 1e-5, centre, dy64)
    assert dw is None
    close(y, expected[0], 2 * TOLERANCES[dtype])
    close(dx, expected[1] + through64, 2 * TOLERANCES[dtype])
    if centre:
        close(db, dy64.sum(0), 1e-5)


@pytest.mark.parametrize("dtype, width, centre", [("bfloat16", 64, True), ("float32", 1100, True)])
def test_norm_by_few_blocks(world, monkeypatch, dtype, width, centre):
    """Each goes through several rows, the last ones through one less."""
    monkeypatch.setattr(norms, "BLOCKS", 2)
    check_norm(world, dtype, 23, width, centre)


def test_norm_of_rows_far_from_zero(world):
    """E[x²] - E[x]² would have no digits left."""
    numbers = Numbers(world, "float32")
    x, x64 = numbers(9, 129, scale=0.01, shift=1000.0)
    y, statistics = norms.forward(x, None, None, 0.0, True)
    close(y, by_op(x64, None, None, 0.0, True, x64)[0], 1e-2)  # x itself has two digits left
    close(statistics[:, 0], x64.mean(1), 1e-6)


def test_norms_of_nothing_and_of_views(world):
    numbers = Numbers(world, "float32")
    x, x64 = numbers(9, 130)
    y, statistics = norms.forward(x[:0], None, None, 1e-5, False)
    dx, dw, db = norms.backward(x[:0], x[:0], statistics, x[0], False)
    assert y.shape == dx.shape == (0, 130) and not dw.get().any() and db is None
    view, view64 = x[:, 1:], x64[:, 1:]  # not contiguous, and not aligned
    y = ops.rmsnorm(Tensor(view), eps=1e-6).data
    close(y, by_op(view64, None, None, 1e-6, False, view64)[0], 3e-6)


# ---- activations

PLAIN = {"GELU_TANH": ops.gelu_tanh, "GELU": ops.gelu, "SILU": ops.silu, "RELU": ops.relu, "RELU2": ops.relu2}
GATED = {"SILU": ops.swiglu, "GELU": ops.geglu}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_activation(world, kind, dtype):
    numbers = Numbers(world, dtype)
    for shape in shapes(world, [(3, 700), (1,), (5, 3)], (3000, 3073)):
        (x, x64), (dy, dy64) = numbers(*shape, scale=3), numbers(*shape)
        y, backward = PLAIN[kind].array(x64)
        close(activations.plain_forward(kind, x), y, TOLERANCES[dtype])
        close(activations.plain_backward(kind, x, dy), backward(dy64), TOLERANCES[dtype])


@pytest.mark.parametrize("kind, dtype", [("SILU", "float16"), ("GELU", "float32")])
def test_gated_activation(world, kind, dtype):
    numbers = Numbers(world, dtype)
    for shape in shapes(world, [(3, 700), (1,), (5, 3)], (3000, 3073)):
        (gate, gate64), (up, up64), (dy, dy64) = numbers(*shape, scale=3), numbers(*shape), numbers(*shape)
        y, backward = GATED[kind].array(gate64, up64)
        close(activations.gated_forward(kind, gate, up), y, TOLERANCES[dtype])
        d_gate, d_up, again = activations.gated_backward(kind, gate, up, dy)
        for ours, theirs in zip((d_gate, d_up, again), [g() for g in backward(dy64)] + [y], strict=True):
            close(ours, theirs, TOLERANCES[dtype])
        assert activations.gated_backward(kind, gate, up, dy, again=False)[2] is None


@pytest.mark.parametrize("kind", PLAIN)
def test_far_values(world, kind):
    """Nothing overflows on the way to a finite result, and what is not a number stays so."""
    x = world.xp.asarray(np.array([-1e12, -300, -88, 88, 300, 1e12, np.nan], np.float32))
    assert PLAIN[kind](Tensor(x[0])).shape == ()
    close(PLAIN[kind](Tensor(x[:6][::2])).data, PLAIN[kind].array(x.get()[:6:2].astype(np.float64))[0], 1e-6)
    y, dx = activations.plain_forward(kind, x).get(), activations.plain_backward(kind, x, world.xp.ones_like(x)).get()
    square = kind == "RELU2"
    assert np.isnan(y[6]) and np.allclose(y[:3], 0, atol=1e-30) and np.allclose(dx[:3], 0, atol=1e-30)
    assert np.allclose(y[3:6], x.get()[3:6] ** (1 + square)) and np.allclose(dx[3:6], 2 * x.get()[3:6] if square else 1)


# ---- RoPE

ROPE_CASES = [  # (format, B, H, T, D, interleaved)
    ("float32", 2, 3, 5, 6, False), ("float32", 1, 2, 3, 2, True), ("float16", 2, 3, 5, 24, True), ("bfloat16", 2, 4, 3, 64, False),
]  # fmt: skip


@pytest.mark.parametrize("dtype, B, H, T, D, interleaved", ROPE_CASES)
def test_rope(world, dtype, B, H, T, D, interleaved):
    numbers = Numbers(world, dtype)
    H, T = world.size((H, T), (16 * H, 99 * T))
    (flat, flat64), (dy, dy64) = numbers(B, T, H * D + 8), numbers(B, H, T, D)
    x, x64 = (a[:, :, 8:].reshape(B, T, H, D).swapaxes(1, 2) for a in (flat, flat64))
    for angles_shape in ((T, D // 2), (B, 1, T, D // 2), (H, 1, D // 2)):
        angles = numbers.random.uniform(-9, 9, angles_shape)
        cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        y64, backward = ops.rope.array(x64, cos.astype(np.float64), sin.astype(np.float64), interleaved=interleaved)
        cos, sin = world.xp.asarray(cos), world.xp.asarray(sin)
        y = rope.turn(x, cos, sin, interleaved=interleaved)
        close(y, y64, TOLERANCES[dtype])
        close(rope.turn(dy, cos, sin, -1, interleaved), backward(dy64)[0], TOLERANCES[dtype])
        assert rope.turn(y, cos, sin, -1, interleaved, out=y) is y
        close(y, x64, 2 * TOLERANCES[dtype])


def test_rope_of_what_is_spread_over_an_axis(world):
    dy, dy64 = Numbers(world, "float32")(2, 3, 1, 8)
    angles = np.random.default_rng(0).uniform(-9, 9, (5, 4))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    expected = ops.rope.array(np.broadcast_to(dy64, (2, 3, 5, 8)), cos.astype(float), -sin.astype(float))[0]
    y = rope.turn(world.xp.broadcast_to(dy, (2, 3, 5, 8)), world.xp.asarray(cos), world.xp.asarray(sin), -1)
    close(y, expected, 3e-6)
    with pytest.raises(ValueError, match="side by side"):
        rope.turn(y, world.xp.asarray(cos), world.xp.asarray(sin), out=y.swapaxes(2, 3))


def test_rope_in_place_in_a_wider_array(world):
    """Queries and keys inside the product that made them: only they change."""
    numbers = Numbers(world, "float16")
    joined, joined64 = numbers(2, 5, 3 * 16)
    cos, sin = (world.xp.asarray(f(numbers.random.uniform(-9, 9, (5, 4))).astype(np.float32)) for f in (np.cos, np.sin))
    heads = joined.reshape(2, 5, 6, 8)[:, :, 2:4].swapaxes(1, 2)
    rope.turn(heads, cos, sin, out=heads)
    expected = joined64.reshape(2, 5, 6, 8)
    turned = ops.rope.array(expected.swapaxes(1, 2)[:, 2:4], cos.get().astype(float), sin.get().astype(float))[0]
    expected[:, :, 2:4] = turned.swapaxes(1, 2)
    close(joined, expected.reshape(2, 5, 48), 1e-3)
    assert (joined.get()[:, :, :16] == joined64[:, :, :16]).all() and (joined.get()[:, :, 32:] == joined64[:, :, 32:]).all()


# ---- the embedding's gradient


def table_gradient(ids, dy, count):
    dw = np.zeros((count, dy.shape[1]))
    np.add.at(dw, ids.reshape(-1), dy)
    return dw


ID_CASES = {
    "random": lambda r, n: r.integers(0, 50, n), "frequent": lambda r, n: r.geometric(0.3, n) - 1, "one": lambda r, n: np.full(n, 7),
    "each once": lambda r, n: r.permutation(n), "runs as long as chunks": lambda r, n: np.arange(n) // 32, "two": lambda r, n: np.arange(n) % 2 * 3,
}  # fmt: skip


@pytest.mark.parametrize("ids", ID_CASES)
def test_embedding_gradient(world, ids):
    for n, (dtype, width) in zip(world.size((1, 64, 100, 133), (33, 5000, 30000, 32768)), [("float32", 9), ("bfloat16", 24)] * 2, strict=True):
        numbers = Numbers(world, dtype)
        chosen, (dy, dy64) = ID_CASES[ids](numbers.random, n), numbers(n, width)
        count = int(chosen.max()) + 2
        expected = table_gradient(chosen, dy64, count)
        dw = world.xp.empty((count, width), np.float32)
        for where in (chosen, world.xp.asarray(chosen)):
            made = embedding.gradient(where, dy, count)
            made.write(dw)
            close(dw, expected, 1e-5)
            made.add(dw)
            close(dw, 2 * expected, 1e-5)


def test_embedding_and_its_leaf(world):
    """Forward, gradient written into a buffer, then added; ids on the host cost no synchronisation."""
    numbers = Numbers(world, "float32")
    (w, w64), ids = numbers(11, 6), numbers.random.integers(0, 11, (2, 5))
    w = Tensor(w, requires_grad=True)
    w.buffer = world.xp.full((11, 6), 9, np.float32)
    for times in (1, 2):
        dy, dy64 = Numbers(world, "float32")(2, 5, 6)
        with nobody_waits(world):
            y = ops.embedding(w, ids)
            y.backward(dy)
        assert w.grad is w.buffer
        close(y.data, w64[ids], 1e-12)
        close(w.grad, times * table_gradient(ids, dy64.reshape(10, 6), 11), 1e-6)
    assert ops.embedding(w, ids[:, :0]).shape == (2, 0, 6)
    with pytest.raises(ValueError, match="id 11 is outside the vocabulary of 11"):
        ops.embedding(w, np.array([3, 11]))


# ---- sums


@pytest.mark.parametrize("dtype, columns", [("float32", 7), ("bfloat16", 264), ("float16", 520)])
def test_column_sums(world, dtype, columns):
    numbers = Numbers(world, dtype)
    for rows in shapes(world, [1, 0, 50, 300], 70001):
        for wider, first in ((8, 0), (8, 1), (9, 0)):
            x, x64 = numbers(rows, columns + wider)
            close(sums.column_sums(x[:, first : columns + first]), x64[:, first : columns + first].sum(0), 1e-5)


# ---- all of them


def every_kernel(world):
    """Results of each kernel, on sizes where several warps, chunks and parts share the work."""
    numbers = Numbers(world, "bfloat16")
    (x, _), (dy, _), (w, _) = numbers(13, 64), numbers(13, 64), numbers(64, dtype="float32")
    y, statistics, s = norms.forward(x, w, w, 1e-5, True, dy)
    dw = world.xp.zeros((3, 64), np.float32)
    ids = np.arange(13) % 3
    embedding.gradient(np.repeat(ids, 10), world.xp.concatenate([dy] * 10), 3).add(dw)
    cos, sin = (world.xp.asarray(f(np.arange(104.0).reshape(13, 8)).astype(np.float32)) for f in (np.cos, np.sin))
    turned = rope.turn(dy.reshape(1, 13, 4, 16).swapaxes(1, 2), cos, sin)
    return [y, statistics, s, *norms.backward(dy, x, statistics, w, True, dy), dw, turned, *activations.swiglu_backward(x, dy, dy), sums.column_sums(x)]


def test_the_same_bits_in_every_run(world):
    if world.name == "gpu":
        first, second = ([a.get().tobytes() for a in every_kernel(world)] for _ in range(2))
        assert first == second
    else:
        from cuda_on_cpu import in_every_order

        in_every_order(lambda: [a.get() for a in every_kernel(world)])


@pytest.mark.cuda_on_cpu
def test_bytes_moved(monkeypatch):
    """What the .cu files say of it, for each number; a few more for statistics, gains and partial rows."""
    from cuda_on_cpu import traffic

    with entered("fake") as world:
        numbers, N, C = Numbers(world, "bfloat16"), 128, 128
        (x, _), (w, _), (z, _), (dy, _) = numbers(N, C), numbers(C, dtype="float32"), numbers(N, C), numbers(N, C)
        _, statistics = norms.forward(x, w, w, 1e-5, True)
        monkeypatch.setattr(norms, "BLOCKS", 2)
        monkeypatch.setattr(sums, "PARTS", 2)
        heads, angles = x.reshape(1, 32, 8, 64).swapaxes(1, 2), world.xp.ones((32, 32), np.float32)
        moved = {
            "forward": (lambda: norms.forward(x, w, w, 1e-5, True), 2, 2),
            "forward with plus": (lambda: norms.forward(x, w, w, 1e-5, True, z), 4, 4),
            "backward": (lambda: norms.backward(dy, x, statistics, w, True), 4, 2),
            "backward with plus": (lambda: norms.backward(dy, x, statistics, w, True, z), 6, 2),
            "gelu": (lambda: activations.gelu_forward(x), 2, 2),
            "its backward": (lambda: activations.gelu_backward(x, dy), 4, 2),
            "swiglu": (lambda: activations.swiglu_forward(x, z), 4, 2),
            "its backward and y": (lambda: activations.swiglu_backward(x, z, dy), 6, 6),
            "rope": (lambda: rope.turn(heads, angles, angles), 2, 2),
            "column sums": (lambda: sums.column_sums(x), 2, 0),
        }
        for name, (run, read, written) in moved.items():
            found = traffic(run)
            assert read <= found.read / x.size < read + 0.6 and written <= found.written / x.size < written + 0.3, (name, str(found))
            assert found.beyond_ideal("shared") == 0 and found.beyond_ideal("global") <= 0.02 * x.size, (name, str(found))


def test_nobody_waits(world):
    with nobody_waits(world):
        every_kernel(world)


def test_ops_use_them(world):
    """The ops' own twins: forward and backward through the engine, in both widths, against the op in float64."""
    numbers = Numbers(world, "float16")
    (x, x64), (z, z64), (w, w64), (dy, dy64) = numbers(2, 3, 16), numbers(2, 3, 16), numbers(16, dtype="float32"), numbers(2, 3, 16)
    angles = np.arange(24.0).reshape(3, 8)
    for op, arrays, exact in (
        (ops.layernorm, (x, w, w), (x64, w64, w64)), (ops.rmsnorm, (x, w), (x64, w64)), (ops.gelu_tanh, (x,), (x64,)), (ops.gelu, (x,), (x64,)),
        (ops.silu, (x,), (x64,)), (ops.relu, (x,), (x64,)), (ops.relu2, (x,), (x64,)), (ops.swiglu, (x, z), (x64, z64)), (ops.geglu, (x, z), (x64, z64)),
        (ops.rope, (x, *(world.xp.asarray(f(angles).astype(np.float32)) for f in (np.cos, np.sin))), (x64, np.cos(angles), np.sin(angles))),
    ):  # fmt: skip
        inputs = [Tensor(a, requires_grad=True) for a in arrays]
        y = op(*inputs)
        y.backward(dy)
        expected, backward = op.array(*exact)
        close(y.data, expected, 1e-3)
        assert y.dtype == np.float16
        gradients = backward(dy64)
        for ours, theirs in zip(inputs, gradients if isinstance(gradients, tuple) else [gradients], strict=True):
            if theirs is not None:
                close(ours.grad, theirs() if callable(theirs) else theirs, 2e-3)
                assert ours.grad.dtype == ours.dtype


def test_the_longest_access_that_all_arrays_allow(world):
    x, w = world.xp.zeros((4, 24), np.float16), world.xp.zeros(32, np.float32)
    assert vectors.widest(24, x) == 8 and vectors.widest(24, x, w, None) == 8
    assert vectors.widest(12, x[:, :12]) == 4 and vectors.widest(7, x) == 1
    assert vectors.widest(8, x[:, 8:16]) == 8 and vectors.widest(8, x[:, 2:10]) == 2 and vectors.widest(8, x[:, 1:9]) == 1
    assert vectors.widest(8, world.xp.zeros((4, 21), np.float16)[:, :8]) == 1 and vectors.widest(8, world.xp.zeros((4, 20), np.float16)[:1, :8]) == 8
    assert vectors.widest(24, x, w[2:]) == 2 and vectors.widest(24, x, w[1:]) == 1 and vectors.widest(24, x, w[4:]) == 8
