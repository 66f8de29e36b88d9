"""The loss on a device: scores, softmax and cross-entropy in one, its gradient in the scores' place; against the op in float64."""
import warnings

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.kernels import KERNELS
from tinyllm.kernels.cuda import cross_entropy
from tinyllm.kernels.cuda.storage import dtype_of
from tinyllm.tensor import Tensor, no_grad

pytest.importorskip("ml_dtypes")  # makes NumPy know bf16

PRECISIONS = ("fp32", "fp16", "bf16")
UNIT = {"fp32": 2**-24, "fp16": 2**-11, "bf16": 2**-8}  # half the distance of neighbouring numbers, relatively: one rounding
SETTINGS = ({}, dict(label_smoothing=0.1), dict(z_loss=1e-2), dict(label_smoothing=0.3, z_loss=1e-3))
WIDTHS = (1, 5, 8, 33, 264, 1000)  # of the vocabulary: less than a vector, odd, several warps
LARGE = (8192, 50257, 50304)


def random(seed=0):
    return np.random.default_rng(seed)


def rounded(x, precision):
    """x as the format holds it, in float64."""
    return x.astype(np.float32).astype(dtype_of(precision)).astype(np.float64)


def rows(world, V, count=None, seed=0, scale=3.0):
    """Scores and targets; every third target is ignored."""
    count = count or world.size(5, 300)
    z, targets = random(seed).standard_normal((count, V)) * scale, random(seed + 1).integers(0, V, count)
    targets[1::3] = -1
    return z, targets


def by_definition(z, targets, weights=None, **settings):
    """(loss, gradient) in float64."""
    loss, backward = ops.cross_entropy.array(z, targets, weights, **settings)
    return loss, backward(np.ones(()))[0]


def close(ours, expected, tolerance):
    ours = ours.get().astype(np.float64)
    assert ours.shape == expected.shape and np.isfinite(ours).all()
    return np.abs(ours - expected).max(initial=0) <= tolerance * max(np.abs(expected).max(initial=0), 1e-30)


# In place

def run_in_place(xp, z, targets, weights, precision, gain, pad=0, shift=0, smoothing=0.0, z_loss=0.0):
    """(losses, gradient or what the scores are then), from scores with `pad` numbers between the rows, `shift` before the first."""
    whole = np.full((len(z), z.shape[1] + pad), 7.0)
    whole[:, : z.shape[1]] = z
    memory = xp.asarray(np.concatenate([np.zeros(shift), whole.ravel()]).astype(np.float32)).astype(dtype_of(precision))
    scores = memory[shift:].reshape(whole.shape)[:, : z.shape[1]]
    losses = xp.empty(len(z), dtype=xp.float32)
    t, u = xp.asarray(np.where(targets < 0, 0, targets).astype(np.int32)), xp.asarray(weights.astype(np.float32))
    cross_entropy.in_place(scores, t, u, losses, smoothing, z_loss, gain)
    return losses.get().astype(np.float64), scores.get().astype(np.float64)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pad, shift", [(0, 0), (3, 1), (8, 8)])
def test_rows_in_place(world, precision, pad, shift):
    """Each row's loss to fp32's digits, each gradient rounded once; vectors and single numbers, whole and broken rows."""
    for V in world.size(WIDTHS, LARGE):
        z, targets = rows(world, V)
        z, weights = rounded(z, precision), np.where(targets < 0, 0.0, random(3).uniform(0.2, 1.0, len(z)))
        gain = cross_entropy.GAIN[cross_entropy.FORMATS[dtype_of(precision).name]]
        losses, gradient = run_in_place(world.xp, z, targets, weights, precision, gain, pad, shift)
        for row, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            if target < 0:
                assert losses[row] == 0 and not gradient[row].any()
                continue
            loss, expected = by_definition(z[row : row + 1], targets[row : row + 1])
            assert losses[row] == pytest.approx(weight * loss, rel=2e-6, abs=2e-6)
            error = np.abs(gradient[row] / gain - weight * expected[0])
            assert (error <= UNIT[precision] * np.abs(weight * expected[0]) + 4e-7 * weight).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_longer_than_a_block_is_wide(world, precision):
    """Each thread goes over several vectors: it meets larger scores later, and smaller ones."""
    V = world.size(8192 + 9, 2**18 + 9)
    z = np.stack([np.linspace(-20, 20, V), np.linspace(20, -20, V), np.where(np.arange(V) % 3, 0.0, 5.0)])
    z, targets = rounded(z, precision), np.array([V - 1, V - 2, 4096])
    gain = cross_entropy.GAIN[cross_entropy.FORMATS[dtype_of(precision).name]]
    losses, gradient = run_in_place(world.xp, z, targets, np.ones(3), precision, gain, pad=-V % 8)
    for row in range(3):
        loss, expected = by_definition(z[row : row + 1], targets[row : row + 1])
        assert losses[row] == pytest.approx(loss, rel=3e-6)
        assert (np.abs(gradient[row] / gain - expected[0]) <= UNIT[precision] * np.abs(expected[0]) + 4e-7).all()


@pytest.mark.parametrize("smoothing, z_loss", [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3)])
def test_label_smoothing_and_z_loss_in_place(world, smoothing, z_loss):
    for V in world.size((1, 33, 264), LARGE):
        z, targets = rows(world, V)
        z, targets = rounded(z, "fp32"), np.maximum(targets, 0)
        losses, gradient = run_in_place(world.xp, z, targets, np.ones(len(z)), "fp32", 1.0, 0, 0, smoothing, z_loss)
        for row in range(len(z)):
            loss, expected = by_definition(z[row : row + 1], targets[row : row + 1], label_smoothing=smoothing, z_loss=z_loss)
            assert losses[row] == pytest.approx(loss, rel=2e-6, abs=2e-6)
            np.testing.assert_allclose(gradient[row], expected[0], rtol=3e-6, atol=1e-6)


def test_scores_stay_where_no_gradient_is_asked_for(world):
    z, targets = rows(world, 33)
    z = rounded(z, "bf16")
    _, after = run_in_place(world.xp, z, targets, np.ones(len(z)), "bf16", None)
    assert np.array_equal(after, z)


def test_huge_scores_lose_no_digits_and_infinite_ones_are_no_trap(world):
    """Differences count; -∞ is a token that cannot come; +∞ and NaN make a loss that is not finite; but not in a row of weight 0."""
    z = np.full((6, 40), -1e4)
    z[:, 7], z[:, 8] = 1e4, 1e4 - 3
    z[1, :] = -np.inf
    z[1, 3:5] = 2.0
    z[2, 9] = np.inf
    z[3, 9] = np.nan
    z[4, 9], z[5, 9] = np.inf, np.nan
    targets, weights = np.array([8, 3, 0, 0, 0, 0]), np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    losses, gradient = run_in_place(world.xp, z, targets, weights, "fp32", 1.0)
    assert losses[0] == pytest.approx(3 + np.log1p(np.exp(-3)), rel=1e-6) and losses[1] == pytest.approx(np.log(2), rel=1e-6)
    assert not np.isfinite(losses[2:4]).any() and not losses[4:].any() and not gradient[4:].any()
    assert np.isfinite(gradient[:2]).all() and not np.isfinite(gradient[2:4]).all(-1).any()
    assert gradient[1, 3] == pytest.approx(-0.5) and gradient[1, 4] == pytest.approx(0.5) and np.count_nonzero(gradient[1]) == 2


# The op

def operands(world, V, C, count, precision, seed=0):
    r = random(seed)
    x, w = rounded(r.standard_normal((count, C)), precision), rounded(r.standard_normal((V, C)) * 0.5, precision)
    targets = r.integers(0, V, count)
    targets[1::4] = -1
    return x, w, targets


def fused(world, x, w, targets, weights, precision, scale=1.0, **settings):
    """(loss, dx, dw) of the whole way through the engine, for an upstream gradient of `scale`."""
    xp, dtype = world.xp, dtype_of(precision)
    a, b = (Tensor(xp.asarray(v.astype(np.float32)).astype(dtype), requires_grad=True) for v in (x, w))
    loss = ops.linear_cross_entropy(a, b, targets, weights, **settings)
    assert loss.dtype == np.float32 and loss.shape == ()
    loss.backward(scale)
    assert (a.grad.dtype, b.grad.dtype) == (dtype, dtype)
    return loss.data, a.grad, b.grad


def expected_of(x, w, targets, weights=None, **settings):
    loss, backward = ops.linear_cross_entropy.array(x, w, targets, weights, **settings)
    return loss, *backward(np.ones(()))[:2]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_cross_entropy_equals_its_op(world, precision, settings):
    V, C, count = world.size((41, 24, 11), (50304, 768, 3000))
    x, w, targets = operands(world, V, C, count, precision)
    x = x.reshape(1, count, C)
    loss, dx, dw = fused(world, x, w, targets.reshape(1, count), None, precision, rows=world.size(4, 1024), **settings)
    expected, ex, ew = expected_of(x, w, targets.reshape(1, count), **settings)
    tolerance = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}[precision]
    assert float(loss) == pytest.approx(expected, rel=tolerance)
    assert close(dx, ex, tolerance) and close(dw, ew, tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_slice_or_many(world, precision):
    """The last bits of dw may differ, as sums are cut elsewhere; losses and dx are each row's own."""
    x, w, targets = operands(world, 37, 16, 13, precision)
    (loss, dx, dw), many = fused(world, x, w, targets, None, precision), fused(world, x, w, targets, None, precision, rows=3)
    assert float(loss) == float(many[0]) and np.array_equal(dx.get(), many[1].get())
    assert close(dw, many[2].get().astype(np.float64), 2 * UNIT[precision] + 1e-6)


@pytest.mark.parametrize("where", ["host", "device"])
def test_weights_and_targets_on_either_side(world, where):
    x, w, targets = operands(world, 19, 8, 9, "fp32")
    weights = random(5).uniform(0, 3, 9).astype(np.float32)
    expected, ex, ew = expected_of(x, w, targets, weights)
    if where == "device":
        targets, weights = world.xp.asarray(targets), world.xp.asarray(weights)
    loss, dx, dw = fused(world, x, w, targets, weights, "fp32")
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert close(dx, ex, 1e-5) and close(dw, ew, 1e-5)


def test_fp32_weights_of_16_bit_vectors_get_an_fp32_gradient(world):
    x, w, targets = operands(world, 19, 8, 9, "bf16")
    a = Tensor(world.xp.asarray(x.astype(np.float32)).astype(dtype_of("bf16")), requires_grad=True)
    b = Tensor(world.xp.asarray(w.astype(np.float32)), requires_grad=True)
    ops.linear_cross_entropy(a, b, targets).backward()
    _, dx, dw = fused(world, x, w, targets, None, "bf16")
    assert b.grad.dtype == np.float32 and np.array_equal(b.grad.astype(dw.dtype).get(), dw.get()) and np.array_equal(a.grad.get(), dx.get())


def test_small_gradients_survive_fp16(world):
    """A million rows' share, or a token of probability 10⁻⁷, is far below what fp16 can hold: 6·10⁻⁸."""
    z = np.zeros((1, 64))
    z[0, 0] = 16.0
    _, expected = by_definition(z, np.array([0]))
    _, gradient = run_in_place(world.xp, z, np.array([0]), np.ones(1), "fp16", cross_entropy.GAIN["FP16"])
    np.testing.assert_allclose(gradient[0] / cross_entropy.GAIN["FP16"], expected[0], rtol=1e-2)
    assert 1e-7 < expected[0, 1] < 2e-7
    x, w, targets = operands(world, 33, 16, 8, "fp16")
    scale = 2.0**-12
    (_, dx, _), (_, ex, _) = fused(world, x, w, targets, None, "fp32", scale=scale), expected_of(x, w, targets)
    assert close(dx, ex * scale, 1e-5)


def test_all_ignored(world):
    x, w, targets = operands(world, 19, 8, 5, "bf16")
    with pytest.warns(RuntimeWarning, match="every target is ignored"):
        loss, dx, dw = fused(world, x, w, np.full_like(targets, -1), None, "bf16")
    assert float(loss) == 0 and not dx.get().any() and not dw.get().any()


def test_ids_out_of_range_are_refused(world):
    x, w, targets = operands(world, 19, 8, 5, "fp32")
    for wrong in (19, -2):
        with pytest.raises(ValueError, match=f"id {wrong} is outside the vocabulary of 19"):
            fused(world, x, w, np.where(targets == targets[0], wrong, targets), None, "fp32")


def test_no_row_goes_to_the_op(world):
    x, w = np.zeros((0, 8)), random().standard_normal((19, 8))
    with pytest.warns(RuntimeWarning, match="every target is ignored"):
        loss, dx, dw = fused(world, x, w, np.zeros(0, int), None, "fp32")
    assert float(loss) == 0 and dx.shape == (0, 8) and not dw.get().any()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cross_entropy_of_scores_equals_its_op(world, precision, settings):
    z, targets = rows(world, world.size(29, 50257))
    z, dtype = rounded(z, precision), dtype_of(precision)
    weights = random(5).uniform(0, 3, len(z)).astype(np.float32)
    scores = Tensor(world.xp.asarray(z.astype(np.float32)).astype(dtype), requires_grad=True)
    loss = ops.cross_entropy(scores, targets, weights, **settings)
    loss.backward(8.0)
    expected, gradient = by_definition(z, targets, weights, **settings)
    assert loss.dtype == np.float32 and float(loss.data) == pytest.approx(expected, rel=1e-5)
    assert scores.grad.dtype == dtype and close(scores.grad, gradient * 8, 2 * UNIT[precision] + 1e-6)
    assert np.array_equal(scores.data.get().astype(np.float64), z)  # which are the user's


def test_scores_of_strided_memory(world):
    z, targets = rows(world, 29)
    scores = world.xp.asarray(np.asfortranarray(z.astype(np.float32)))
    y, backward = KERNELS["cuda"]["cross_entropy"](scores.T.reshape(29, -1).T, targets)
    expected, gradient = by_definition(z.astype(np.float32).astype(np.float64), targets)
    assert float(y) == pytest.approx(expected, rel=1e-5) and close(backward(world.xp.ones((), dtype=np.float32))[0], gradient, 1e-5)


def test_nothing_waits(world):
    """Ids and targets of the host are checked there: no look at the device is needed."""
    if world.name == "gpu":
        pytest.skip("the fake device counts")
    x, w, targets = operands(world, 41, 24, 11, "bf16")
    with world.xp.forbidden():
        fused(world, x, w, targets, None, "bf16", rows=4)


def test_evaluation_makes_no_gradient(world, monkeypatch):
    in_place, gains = cross_entropy.in_place, []

    def watched(*arguments):
        gains.append(arguments[-1])
        in_place(*arguments)

    monkeypatch.setattr(cross_entropy, "in_place", watched)
    x, w, targets = operands(world, 41, 24, 11, "bf16")
    a, b = (world.xp.asarray(v.astype(np.float32)).astype(dtype_of("bf16")) for v in (x, w))
    with no_grad(), warnings.catch_warnings():
        loss, _ = KERNELS["cuda"]["linear_cross_entropy"](a, b, targets, rows=4)
    assert float(loss) == pytest.approx(expected_of(x, w, targets)[0], rel=3e-2)
    assert gains == [None] * 3


def test_no_more_memory_than_a_slice_of_scores_and_the_gradients(world):
    """All scores would be 1 MB, a slice of them is 128 KB."""
    if world.name == "gpu":
        pytest.skip("the fake device's pool counts what is in use")
    N, V, C, rows = 512, 1000, 32, 64
    x, w, targets = operands(world, V, C, N, "bf16")
    xp, dtype, pool = world.xp, dtype_of("bf16"), world.xp.get_default_memory_pool()
    a, b = (Tensor(xp.asarray(v.astype(np.float32)).astype(dtype), requires_grad=True) for v in (x, w))
    ops.linear_cross_entropy(a, b, targets, rows=rows).backward()  # once before: the products' scratch memory stays
    a.grad = b.grad = None
    pool.free_all_blocks()
    before = pool.used_bytes()
    loss = ops.linear_cross_entropy(a, b, targets, rows=rows)
    gradients, little = 4 * (N * C + V * C), 20 * N + 8192
    assert pool.total_bytes() - before <= rows * 1024 * 2 + gradients + little
    assert pool.used_bytes() - before <= gradients + little  # the scores are gone
    loss.backward()
    assert pool.total_bytes() - before <= max(rows * 1024 * 2, 2 * (N * C + V * C)) + gradients + little


def test_a_row_is_read_once_and_written_once(world):
    """The head comment's bytes, counted; and no vector is broken into more sectors than it needs."""
    if world.name == "gpu":
        pytest.skip("the emulator counts")
    import cuda_on_cpu

    z, targets = rows(world, 16384 - 64)
    moved = cuda_on_cpu.traffic(lambda: run_in_place(world.xp, rounded(z, "bf16"), targets, np.ones(len(z)), "bf16", 1.0))
    assert moved.beyond_ideal("global") == moved.beyond_ideal("shared") == 0
    assert moved.read <= 2 * z.size + 64 * len(z) and moved.written <= 2 * z.size + 64 * len(z)


def test_slices_fill_the_memory_that_is_given_and_are_equally_long():
    for count, V in ((32768, 50304), (8192, 50304), (1, 10), (3000, 2**22), (10**6, 1000)):
        for itemsize in (2, 4):
            step = cross_entropy._rows(count, V, itemsize)
            slices = -(-count // step)
            assert step % 128 == 0 and (step <= 1024 + 128 or step * V * itemsize <= cross_entropy.SCORES * 1.2)
            assert slices * step - count < slices * 128 + 128
