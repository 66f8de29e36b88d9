"""Anomaly mode: it names the first op that made NaN or infinity, and finds values changed behind the engine's back."""
import numpy as np
import pytest

from tinyllm import ops
from tinyllm.anomaly import describe, detect_anomaly
from tinyllm.tensor import Tensor, no_grad


def test_the_first_op_is_named_with_shapes_and_ranges():
    x = Tensor(np.array([[1.0, 2.0], [0.0, 5.0]]), requires_grad=True)
    with detect_anomaly(), np.errstate(divide="ignore"):
        with pytest.raises(FloatingPointError) as error:
            ops.exp(ops.log(x * 2.0) + 1.0)
    assert str(error.value) == (
        "the op 'log' made NaN or infinity: result float64[2, 2] in 0.6931 … 2.303, 1 not finite; from float64[2, 2] in 0 … 10"
    )


def test_all_arguments_are_described():
    a, b = Tensor(np.ones((2, 3), np.float32)), Tensor(np.zeros(3, np.float32))
    with detect_anomaly(), np.errstate(divide="ignore"):
        with pytest.raises(FloatingPointError, match=r"'div'.*no finite value, 6 not finite; from float32\[2, 3\] in 1 … 1; float32\[3\] in 0 … 0"):
            a / b


def test_the_first_op_of_the_backward_is_named():
    x = Tensor(np.array([0.0, 1.0]), requires_grad=True)
    with detect_anomaly():
        loss = (ops.sqrt(x) * 3.0).sum()
        with pytest.raises(FloatingPointError, match="the backward of 'sqrt' for its input 0 made NaN or infinity"), np.errstate(divide="ignore"):
            loss.backward()


def test_nothing_is_blamed_for_what_it_was_given():
    bad = Tensor(np.array([np.nan, np.inf, 1.0]))
    mask = np.array([True, False, True])
    with detect_anomaly():
        y = ops.masked_fill(bad * 2.0, mask, value=-np.inf)
        ops.where(mask, y, -np.inf)
        ops.softmax(ops.masked_fill(Tensor(np.ones(3)), mask, value=-np.inf))  # infinities are what a mask is made of


def test_nan_made_from_infinity_is_a_fault():
    hidden = Tensor(np.full((1, 3), -np.inf))
    with detect_anomaly(), np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="the op 'softmax' made NaN"):
        ops.softmax(hidden)


def test_integers_and_numbers_pass():
    with detect_anomaly():
        ops.embedding(Tensor(np.ones((3, 2)), True), np.array([0, 2])).sum().backward()
        ops.clip(Tensor(np.array([1.0, np.inf])), low=-1.0, high=2.0)
        ops.add(2.0, 3.0)
        ops.dropout(Tensor(np.ones(3)), rate=0.5, rng=np.random.default_rng(0))


@pytest.mark.parametrize("which", ["input", "result", "mask"])
def test_values_changed_through_data_are_found(which):
    x, mask = Tensor(np.ones((2, 2)), requires_grad=True), np.array([True, False])
    h = x * 2.0
    with detect_anomaly():
        y = ops.masked_fill(ops.exp(h), mask, value=0.0)
        if which == "result":
            y.data[...] = 7.0
        elif which == "input":
            h.data[0, 0] = 7.0
        else:
            mask[...] = False
        with pytest.raises(RuntimeError, match=r"op '(exp|masked_fill)' \(.*\) was changed in place between forward and backward"):
            y.sum().backward()


def test_values_that_hold_nan_are_not_taken_for_changed():
    x = Tensor(np.array([np.nan, 1.0]), requires_grad=True)
    with detect_anomaly():
        (x * 2.0).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_results_are_the_same_and_the_mode_ends_with_its_block():
    def gradient():
        x = Tensor(np.random.default_rng(0).standard_normal((3, 4)), requires_grad=True)
        ops.cross_entropy(ops.layernorm(x), np.array([0, 1, 2])).backward()
        return x.grad

    with detect_anomaly(), np.errstate(invalid="ignore"):
        found = gradient()
        with no_grad(), pytest.raises(FloatingPointError):
            ops.log(Tensor(np.array([-1.0])))
    assert np.array_equal(found, gradient())
    with np.errstate(invalid="ignore"):
        ops.log(Tensor(np.array([-1.0])))


def test_descriptions():
    assert describe(np.array([1.5, -2.0], np.float32)) == "float32[2] in -2 … 1.5"
    assert describe(np.array([np.nan, np.inf])) == "float64[2] in no finite value, 2 not finite"
    assert describe(np.zeros((0, 3))) == "float64[0, 3] in no finite value"
    assert describe(np.array([True, False])) == "bool[2] in 0 … 1"
    assert describe(2.5) == "float64[] in 2.5 … 2.5"
