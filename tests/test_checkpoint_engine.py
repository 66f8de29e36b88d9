"""Activation checkpointing: the same gradients, bit for bit, for less memory."""
import gc
import tracemalloc
import weakref

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.anomaly import detect_anomaly
from tinyllm.recompute import checkpoint
from tinyllm.tensor import Tensor, no_grad

WIDTH = 16


def parameters(seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return [Tensor(random.standard_normal((WIDTH, WIDTH)).astype(dtype), requires_grad=True) for _ in range(3)]


def block(h, w, rng=None):
    """A residual branch that uses h several times, and its parameter twice."""
    a = ops.tanh(ops.linear(ops.rmsnorm(h), w))
    if rng is not None:
        a = ops.dropout(a, rate=0.4, rng=rng)
    return h + ops.linear(a, w) * h + ops.softmax(h)


def gradients(run, dtype=np.float64):
    """Gradients of the input and of all parameters, for a function (x, parameters) -> Tensor."""
    ws = parameters(dtype=dtype)
    x = Tensor(np.random.default_rng(9).standard_normal((5, WIDTH)).astype(dtype), requires_grad=True)
    y = run(x, ws)
    y.backward(np.random.default_rng(8).standard_normal(y.shape))
    return [y.data, x.grad, *(w.grad for w in ws)]


def identical(a, b):
    """Bit for bit; None where a parameter took no part."""
    return all((x is y is None) or (x.dtype == y.dtype and x.tobytes() == y.tobytes()) for x, y in zip(a, b, strict=True))


def plain(x, ws, rng=None):
    h = x
    for w in ws:
        h = block(h, w, rng)
    return h


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_are_bitwise_those_of_the_plain_call(dtype):
    def checkpointed(x, ws):
        h = x
        for w in ws:
            h = checkpoint(block, h, w)
        return h

    assert identical(gradients(plain, dtype), gradients(checkpointed, dtype))


def test_parameters_that_the_function_reaches_on_its_own():
    def checkpointed(x, ws):
        return checkpoint(lambda h: plain(h, ws), x)

    assert identical(gradients(plain), gradients(checkpointed))


def test_bitwise_also_where_input_and_parameters_are_used_inside_and_outside():
    """Sums of floating-point numbers depend on their order: the replay has to add its parts where the plain call does."""

    def run(around):
        def model(x, ws):
            h = ops.tanh(ops.linear(x, ws[0]))
            y = around(lambda h: block(block(h, ws[0]), ws[1]), h)
            z = around(lambda h: block(h, ws[0]), h)
            return y * h + block(z, ws[1]) + x + ops.linear(h, ws[0])

        return gradients(model, np.float32)

    assert identical(run(lambda f, h: f(h)), run(checkpoint))


def test_values_of_the_graph_may_be_reached_on_its_own_too():
    def run(around):
        def model(x, ws):
            gate = ops.sigmoid(ops.linear(x, ws[0]))
            y = around(lambda h: ops.linear(h, ws[1]) * gate, x)
            return y + gate

        return gradients(model)

    assert identical(run(lambda f, h: f(h)), run(checkpoint))


def test_randomness_is_replayed_and_the_stream_goes_on_as_before():
    def run(around):
        rng = np.random.default_rng(4)

        def model(x, ws):
            h = around(lambda h: block(h, ws[0], rng), x, rng)
            h = around(lambda h: block(h, ws[1], rng), h, rng)
            return ops.dropout(ops.linear(h, ws[2]), rate=0.5, rng=rng)

        return gradients(model), rng.random(3).tolist()

    (a, after), (b, after_too) = run(lambda f, h, rng: f(h)), run(lambda f, h, rng: checkpoint(f, h, rng=rng))
    assert identical(a, b) and after == after_too


def test_the_stream_is_put_back_where_a_replay_fails():
    rng = np.random.default_rng(0)
    calls = []

    def fails_the_second_time(x):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError
        return ops.dropout(x, rate=0.5, rng=rng)

    y = checkpoint(fails_the_second_time, Tensor(np.ones(3), True), rng=rng)
    expected = rng.bit_generator.state
    with pytest.raises(KeyError):
        y.backward(np.ones(3))
    assert rng.bit_generator.state == expected


def test_nested():
    def run(around):
        rng = np.random.default_rng(4)

        def inner(h, w):
            return around(lambda h, w: block(h, w, rng), h, w, rng=rng)

        def outer(h, *ws):
            for w in ws:
                h = inner(h, w)
            return ops.dropout(h, rate=0.1, rng=rng)

        return gradients(lambda x, ws: around(outer, x, *ws, rng=rng))

    assert identical(run(lambda f, *inputs, rng: f(*inputs)), run(checkpoint))


def test_inputs_that_are_no_tensors():
    def function(h, mask, factor, nothing, w):
        assert nothing is None and factor == 2
        return ops.linear(ops.where(mask, h, 0.0), w) * factor

    mask = np.arange(WIDTH) % 2 == 0
    assert identical(
        gradients(lambda x, ws: function(x, mask, 2, None, ws[0])),
        gradients(lambda x, ws: checkpoint(function, x, mask, 2, None, ws[0])),
    )


def test_a_frozen_part_is_no_error():
    """The first blocks of a model whose embedding and blocks are frozen: nothing in them wants a gradient."""
    x, frozen, w = Tensor(np.ones((5, WIDTH))), Tensor(np.eye(WIDTH)), parameters()[0]
    h = checkpoint(block, x, frozen)
    block(h, w).sum().backward()
    assert w.grad is not None and x.grad is None and frozen.grad is None


def test_a_function_that_returns_its_input():
    x = Tensor(np.ones(3), requires_grad=True)
    checkpoint(lambda x: x, x).sum().backward()
    assert x.grad.tolist() == [1.0] * 3


def test_under_no_grad_nothing_is_recorded():
    calls = []
    with no_grad():
        y = checkpoint(lambda x: calls.append(1) or x * 2.0, Tensor(np.ones(3), True))
    assert not y.requires_grad and len(calls) == 1


def test_memory_is_that_of_the_inputs():
    def peak(around):
        x = Tensor(np.random.default_rng(0).standard_normal((500, WIDTH)), requires_grad=True)
        ws = [parameters(seed)[0] for seed in range(12)]
        tracemalloc.start()
        try:
            h = x
            for w in ws:
                h = around(block, h, w)
            kept = tracemalloc.get_traced_memory()[0]
            h.sum().backward()
            return kept, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    (kept, top), (kept_less, top_less) = peak(lambda f, *inputs: f(*inputs)), peak(checkpoint)
    assert kept_less < kept / 4 and top_less < top / 2
    assert kept_less < 13 * 500 * WIDTH * 8 * 1.1  # one activation a block


def test_no_cycles_and_nothing_held_after_backward():
    gc.collect()
    gc.disable()
    try:
        x, w = Tensor(np.ones((5, WIDTH)), True), parameters()[0]
        h = x * 1.0
        ref = weakref.ref(h)
        loss = checkpoint(block, h, w).sum()
        del h
        assert ref() is not None  # the replay needs it
        loss.backward()
        assert ref() is None
        h = x * 1.0
        ref = weakref.ref(h)
        loss = checkpoint(block, h, w)
        del h, loss
        assert ref() is None
    finally:
        gc.enable()


def test_a_second_backward_and_a_changed_input_are_errors():
    x = Tensor(np.ones((2, WIDTH)), True)
    loss = checkpoint(block, x, parameters()[0]).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="used and freed"):
        loss.backward()
    h = x * 1.0
    loss = checkpoint(block, h, parameters()[0]).sum()
    with no_grad():
        h[0] = 0.0
    with pytest.raises(RuntimeError, match="'checkpoint'.*changed in place"):
        loss.backward()


def test_another_result_in_the_second_run_is_an_error():
    """A generator that was not passed, or a parameter that has moved: the gradients would be of something that never ran."""
    x, w = Tensor(np.ones((2, WIDTH)), True), parameters()[0]
    rng = np.random.default_rng(0)
    loss = checkpoint(lambda x: ops.dropout(x, rate=0.5, rng=rng), x).sum()
    with pytest.raises(RuntimeError, match="another result .* pass the generator"):
        loss.backward()
    loss = checkpoint(lambda x: x @ w, x).sum()
    with no_grad():
        w[0] = 0.0
    with pytest.raises(RuntimeError, match="another result .* change no parameter"):
        loss.backward()
    assert x.grad is None and w.grad is None


def test_in_anomaly_mode_the_fault_inside_is_named():
    x = Tensor(np.array([4.0, 0.0]), requires_grad=True)
    with detect_anomaly(), np.errstate(divide="ignore"):
        loss = checkpoint(ops.sqrt, x).sum()
        with pytest.raises(FloatingPointError, match="the backward of 'sqrt' for its input 0 made NaN or infinity"):
            loss.backward()
