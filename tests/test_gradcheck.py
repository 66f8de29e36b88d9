"""The tester tested: gradcheck must FAIL on every way in which a backward is usually wrong, whatever the method."""
import numpy as np
import pytest

from tinyllm import ops
from tinyllm.gradcheck import Report, gradcheck
from tinyllm.ops.cases import CASES
from tinyllm.tensor import Tensor, op

METHODS = ("central", "projection", "complex")
RANDOM = np.random.default_rng(0)
X, W, B = RANDOM.standard_normal((4, 4)), RANDOM.standard_normal((4, 4)), RANDOM.standard_normal(4)


WRONG = {
    # what is wrong: (forward, backward as a function of dy and the inputs); the right ones are y = x·w, dx = dy·wᵀ, dw = xᵀ·dy
    "scale": (lambda x, w: x @ w, lambda dy, x, w: (dy @ w.T * 1.001, x.T @ dy)),
    "sign": (lambda x, w: x @ w, lambda dy, x, w: (-(dy @ w.T), x.T @ dy)),
    "transpose of a square matrix": (lambda x, w: x @ w, lambda dy, x, w: (dy @ w, x.T @ dy)),
    "transposed result": (lambda x, w: x @ w, lambda dy, x, w: (dy @ w.T, (x.T @ dy).T)),
    "dy taken for ones": (lambda x, w: x @ w, lambda dy, x, w: (np.ones_like(dy) @ w.T, x.T @ dy)),
    "zero": (lambda x, w: x @ w, lambda dy, x, w: (np.zeros_like(x), x.T @ dy)),
    "none": (lambda x, w: x @ w, lambda dy, x, w: (None, x.T @ dy)),
    "second input's zero": (lambda x, w: x @ w, lambda dy, x, w: (dy @ w.T, np.zeros_like(w))),
    "inputs exchanged": (lambda x, w: x * w, lambda dy, x, w: (dy * x, dy * w)),
    "missing term": (lambda x, w: x * w + x**3, lambda dy, x, w: (dy * w, dy * x)),
    "factor 2 of a square": (lambda x, w: x * x + w, lambda dy, x, w: (dy * x, dy)),
    "missing product rule": (lambda x, w: x / (w * w + 1), lambda dy, x, w: (dy / (w * w + 1), -dy * x / (w * w + 1) ** 2)),
    "missing broadcast sum": (lambda x, w: x + w[0], lambda dy, x, w: (dy, np.concatenate([dy[:1], np.zeros((3, 4))]))),
    "NaN": (lambda x, w: x @ w, lambda dy, x, w: (dy @ w.T * np.nan, x.T @ dy)),
    "infinity": (lambda x, w: x @ w, lambda dy, x, w: (dy @ w.T + np.inf, x.T @ dy)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_backward_fails(fault, method):
    forward, backward = WRONG[fault]

    @op
    def wrong(x, w):
        return forward(x, w), lambda dy: backward(dy, x, w)

    with np.errstate(invalid="ignore"):
        report = gradcheck(wrong, X, W, method=method)
    assert not report
    assert report.worst.name == ("input 1" if fault in ("transposed result", "second input's zero", "missing broadcast sum") else report.worst.name)
    assert "gradients differ by more than 1e-06" in str(report)


@pytest.mark.parametrize("method", METHODS)
def test_the_right_backward_passes(method):
    @op
    def right(x, w, b):
        return x @ w + b, lambda dy: (dy @ w.T, x.T @ dy, dy)

    report = gradcheck(right, X, W, B, method=method)
    assert report and report.error < 1e-9 and "gradients agree" in str(report)
    assert [r.name for r in report.inputs] == ["input 0", "input 1", "input 2"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [0.5, 1.0 + 1e-4, 0.0])
def test_one_wrong_element_among_many_fails(method, factor):
    x = np.random.default_rng(3).standard_normal((40, 25))

    @op
    def one_wrong(x):
        def backward(dy):
            dx = dy * np.cos(x)
            dx[17, 3] *= factor
            return dx

        return np.sin(x), backward

    report = gradcheck(one_wrong, x, method=method, directions=20)
    assert not report
    if method != "projection":
        assert report.worst.where == (17, 3)
        assert np.isclose(report.worst.analytic, report.worst.numeric * factor)
        assert f"input 0[40, 25]: error {report.error:.2e} at (17, 3): backward" in str(report)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-6, 1e-9])
def test_tiny_gradients_are_compared_all_the_same(method, size):
    """A tolerance that is not relative would let a zero gradient pass for one of 1e-6."""

    @op
    def tiny(x, *, right=True):
        return np.sin(x) * size, lambda dy: dy * np.cos(x) * size if right else dy * 0

    assert gradcheck(tiny, X, method=method)
    assert not gradcheck(lambda x: tiny(x, right=False), X, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_large_value_with_a_small_gradient(method):
    """y = 1e4 + sin(x): rounding of y leaves noise in the difference, which must neither fail the right nor pass the wrong."""

    @op
    def lifted(x, *, right=True):
        return np.sin(x) + 1e4, lambda dy: dy * np.cos(x) if right else dy * np.cos(x) * 1.01

    assert gradcheck(lifted, X, method=method)
    assert not gradcheck(lambda x: lifted(x, right=False), X, method=method)


def test_projection_finds_an_error_in_a_big_function():
    """One row's gradient forgotten in a function of 6,000 numbers: 5 directions are enough, at 20 evaluations an input."""
    random = np.random.default_rng(0)
    x, w = random.standard_normal((150, 20)), random.standard_normal((150, 20)) / 10
    calls = []

    @op
    def big_layer(x, w, *, right=True):
        calls.append(1)
        y = np.tanh(x @ w.T)

        def backward(dy):
            dz = dy * (1 - y * y)
            dx = dz @ w
            dx[123] *= 1 if right else 0
            return dx, dz.T @ x

        return y, backward

    assert gradcheck(big_layer, x, w, method="projection", directions=5)
    assert len(calls) <= 2 * 5 * 4 + 3
    report = gradcheck(lambda x, w: big_layer(x, w, right=False), x, w, method="projection", directions=5)
    assert not report and report.worst.name == "input 0" and report.worst.where.startswith("direction ")


ANALYTIC = "add sub mul div neg pow exp log sqrt tanh sigmoid gelu_tanh silu swiglu sum mean var logsumexp reshape transpose swapaxes concatenate "
ANALYTIC += "stack getitem gather pad expand matmul linear einsum softmax log_softmax layernorm rmsnorm mse kl_divergence cross_entropy embedding attention"


@pytest.mark.parametrize("name", ANALYTIC.split())
def test_complex_step_agrees_to_the_last_digits(name):
    cases = [case for case in CASES if case.op == name]
    assert cases
    for case in cases:
        report = gradcheck(case.function, *case.arrays(), method="complex", tolerance=1e-12)
        assert report, (case, report)


def test_float32_is_refused_with_the_reason():
    for dtype in (np.float32, np.float16):
        with pytest.raises(ValueError, match=f"input 1 is {np.dtype(dtype)}, but finite differences need float64: with fewer digits .* rounding error"):
            gradcheck(ops.mul, X, W.astype(dtype))
    with pytest.raises(ValueError, match="gain is float32, but"):
        gain = Tensor(np.ones(4, np.float32), True)
        gradcheck(lambda x: ops.rmsnorm(x, gain), X, parameters={"gain": gain})
    with pytest.raises(ValueError, match="the result is float32"):
        gradcheck(lambda x: ops.cast(x, precision="bf16"), X)


def test_a_function_that_is_not_deterministic_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="two different results for the same input; draw its randomness from a fixed seed"):
        gradcheck(lambda x: ops.dropout(x, rate=0.5, rng=rng), X)
    assert gradcheck(lambda x: ops.dropout(x, rate=0.5, rng=np.random.default_rng(0)), X)


def test_nothing_to_check_is_refused():
    for inputs in ((np.arange(3),), (Tensor(X),), (2.0,), ()):
        with pytest.raises(ValueError, match="nothing to check"):
            gradcheck(lambda *xs: Tensor(np.ones(2), True), *inputs)


def test_other_mistakes_get_a_clear_line():
    with pytest.raises(ValueError, match="method 'centre' is unknown: use one of central, projection, complex"):
        gradcheck(ops.exp, X, method="centre")
    for result in ((Tensor(X),), 1.0, X):
        with pytest.raises(ValueError, match=f"must return one Tensor, got {type(result).__name__}"):
            gradcheck(lambda x, result=result: result, X)


def test_parameters_that_the_function_reaches_by_itself():
    gain, bias, frozen = (Tensor(RANDOM.standard_normal(4), grad) for grad in (True, True, False))
    gain.grad = before = np.full(4, 7.0)
    report = gradcheck(lambda x: ops.layernorm(x, gain, bias) * frozen, X, parameters={"gain": gain, "bias": bias, "frozen": frozen})
    assert report and [r.name for r in report.inputs] == ["input 0", "gain", "bias"]
    assert gain.grad is before and (before == 7).all() and bias.grad is None  # a user's gradients are left alone

    def detached(x):  # a wrong backward of a parameter: its gradient is lost on the way
        return ops.layernorm(x, gain.detach(), bias)

    report = gradcheck(detached, X, parameters={"gain": gain, "bias": bias})
    assert not report and report.worst.name == "gain" and report.worst.analytic == 0


def test_inputs_are_left_as_they_were():
    x, t = X.copy(), Tensor(W.copy(), requires_grad=True)
    gradcheck(ops.mul, x, t)
    assert np.array_equal(x, X) and np.array_equal(t.data, W) and t.grad is None


def test_gradients_are_put_back_where_the_backward_fails():
    @op
    def failing(x, w):
        return x * w, lambda dy: dy * np.array(["no number"])[0]

    w = Tensor(W, requires_grad=True)
    w.grad = before = np.zeros((4, 4))
    with pytest.raises(Exception):  # noqa: B017 (whichever error the op makes)
        gradcheck(lambda x: failing(x, w), X, parameters={"w": w})
    assert w.grad is before


def test_integers_masks_and_constants_are_passed_on():
    report = gradcheck(ops.cross_entropy, X, np.array([0, 3, -1, 2]), Tensor(np.array([1.0, 2.0, 1.0, 0.5])))
    assert report and len(report.inputs) == 1


def test_single_numbers_and_empty_arrays():
    assert gradcheck(ops.exp, np.array(0.3))
    report = gradcheck(ops.mul, np.zeros((0, 3)), np.ones(3))
    assert report and report.inputs[0].where == "no elements"
    assert gradcheck(ops.mul, np.zeros((0, 3)), np.ones(3), method="projection")


def test_the_worst_element_is_named_where_it_is_nan():
    @op
    def one_nan(x):
        dx = np.ones_like(x)
        dx[2, 1] = np.nan
        return x * 1.0, lambda dy: dy * dx

    report = gradcheck(one_nan, X)
    assert not report and report.worst.where == (2, 1) and np.isnan(report.worst.analytic)


def test_the_step_and_the_tolerance_are_the_users():
    coarse = gradcheck(ops.exp, X, step=0.1)
    assert not coarse and gradcheck(ops.exp, X, step=0.1, tolerance=1e-3)
    assert coarse.error > 100 * gradcheck(ops.exp, X).error
    assert not Report(coarse.inputs, tolerance=0.0)


def test_the_upstream_gradient_is_not_what_users_draw_their_inputs_from():
    """Were dy the same numbers as x, then xᵀ·dy would be symmetric, and a transposed gradient would pass for the right one."""
    drawn = []

    @op
    def spy(x):
        return np.exp(x), lambda dy: drawn.append(dy) or dy * np.exp(x)

    x = np.random.default_rng(0).standard_normal((4, 4))
    assert gradcheck(spy, x) and not np.allclose(drawn[0], x)
