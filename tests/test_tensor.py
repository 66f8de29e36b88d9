"""The engine: accumulation, broadcasting, order, ownership of buffers, what is freed and when, and its errors."""
import gc
import tracemalloc
import weakref

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.anomaly import detect_anomaly
from tinyllm.tensor import OPS, Into, Tensor, enable_grad, no_grad, op, recording


def leaf(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


# Gradients: where they go and how they add up.


@pytest.mark.parametrize("shape", [(), (4,), (1,), (3, 1), (1, 4), (2, 1, 1), (1, 3, 4), (2, 3, 4)])
def test_a_broadcast_input_gets_the_sum_over_its_copies(shape):
    x = leaf(*shape)
    dy = np.random.default_rng(1).standard_normal((2, 3, 4))
    y = x + np.zeros((2, 3, 4))
    y.backward(dy)
    expected = np.zeros(shape)
    for index in np.ndindex(2, 3, 4):  # each copy, one at a time
        own = tuple(i if n > 1 else 0 for i, n in zip(index[3 - len(shape) :], shape, strict=True))
        expected[own] += dy[index]
    assert x.grad.shape == shape and np.allclose(x.grad, expected, rtol=1e-14)


def test_gradients_of_several_backwards_add_up():
    x = leaf(3)
    (x * 2.0).sum().backward()
    first = x.grad
    (x * 3.0).sum().backward()
    assert x.grad is first  # in place: what an optimizer holds stays the gradient
    assert x.grad.tolist() == [5.0, 5.0, 5.0]
    x.grad = None
    x.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_leaf_is_its_own_result():
    x = leaf(2)
    x.backward([1.0, 2.0])
    x.backward(1.0)
    assert x.grad.tolist() == [2.0, 3.0]


def test_a_value_used_many_times():
    x = leaf(4)
    y = x
    for _ in range(50):
        y = y + y * 0.1 + x  # residual: y is used twice and x once, at each step
    y.sum().backward()
    expected = 1.0
    for _ in range(50):
        expected = expected * 1.1 + 1
    assert np.allclose(x.grad, expected, rtol=1e-12)


def test_doubling_is_linear_in_the_number_of_ops():
    """h + h, repeated: 2^500 paths, but 500 visits."""
    visits = []

    @op
    def twice(a, b):
        return a + b, lambda dy: visits.append(1) or (dy, dy)

    h = x = Tensor(np.ones(1), requires_grad=True)
    for _ in range(500):
        h = twice(h, h)
    h.backward()
    assert len(visits) == 500 and x.grad[0] == 2.0**500


def test_ten_thousand_ops_in_a_chain():
    h = x = leaf(2)
    for _ in range(10_000):
        h = h + 1.0
    h.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


def test_a_graph_of_100_000_ops_is_destroyed_without_recursion():
    h = ops.tanh(leaf(1))
    ref = watch(h.data)
    for _ in range(100_000):
        h = h + 1.0
    assert ref() is not None  # at the far end of the chain
    del h  # never walked backward: Python takes it apart
    assert ref() is None


def test_paths_of_different_length_meet():
    """A short and a long way to the same value: its gradient is complete before it is passed on."""
    x = leaf(3)
    h = x * 2.0
    long = ops.tanh(ops.exp(h * 0.1))
    (long * h + h).sum().backward()
    numeric = np.tanh(np.exp(0.2 * x.data))
    slope = (1 - numeric**2) * np.exp(0.2 * x.data) * 0.2
    assert np.allclose(x.grad, slope * 2 * x.data + numeric * 2 + 2, rtol=1e-12)


def test_a_gradient_that_two_leaves_share_is_not_shared():
    a, b = leaf(3), leaf(3)
    dy = np.array([1.0, 2.0, 3.0])
    (a + b).backward(dy)
    assert not np.shares_memory(a.grad, b.grad) and not np.shares_memory(a.grad, dy)
    (a * 1.0).sum().backward()
    assert a.grad.tolist() == [2.0, 3.0, 4.0] and b.grad.tolist() == [1.0, 2.0, 3.0] and dy.tolist() == [1.0, 2.0, 3.0]


def test_the_same_gradient_waiting_at_two_ops_is_not_added_into():
    """add hands one dy to two ops; another part that arrives at one of them must not show up in the other."""
    a, b = leaf(3), leaf(3)
    p, q = a * 2.0, b * 3.0
    y = (p * 5.0).sum() + (p + q).sum()  # p's parts: dy of the addition first, then 5
    y.backward()
    assert a.grad.tolist() == [12.0] * 3 and b.grad.tolist() == [3.0] * 3


def test_views_of_one_gradient_do_not_alias():
    a, b = leaf(2, 3), leaf(2, 3)
    dy = np.ones((4, 3))
    ops.concatenate(a, b).backward(dy)
    ops.concatenate(a, b).backward(dy)
    assert (a.grad == 2).all() and (b.grad == 2).all() and (dy == 1).all()


def test_one_new_array_returned_twice_is_not_shared():
    @op
    def both(a, b):
        def backward(dy):
            shared = dy * 2
            return lambda: shared, lambda: shared

        return a + b, backward

    a, b = leaf(3), leaf(3)
    both(a, b).backward(np.ones(3))
    assert not np.shares_memory(a.grad, b.grad)


def test_results_and_gradients_of_single_numbers_are_arrays():
    """NumPy turns 0-d results into scalars, which cannot be written to."""
    x = Tensor(np.array(2.0), requires_grad=True)
    y = x * x * 3.0
    y.backward()
    assert isinstance(y.data, np.ndarray) and isinstance(x.grad, np.ndarray) and x.grad == 12
    x.grad[...] = 0
    (x * 1.0).backward()
    assert x.grad == 1


def test_frozen_inputs_cost_no_gradient_work():
    calls = []

    @op
    def watched(a, b):
        return a * b, lambda dy: (lambda: calls.append("a") or dy * b, lambda: calls.append("b") or dy * a)

    trained, frozen = leaf(3), Tensor(np.ones(3))
    watched(trained, frozen).sum().backward()
    watched(frozen, trained).sum().backward()
    watched(trained, 2.0).sum().backward()
    assert calls == ["a", "b", "a"] and frozen.grad is None
    before = len(calls)
    assert watched(frozen, frozen).node is None and len(calls) == before


def test_gradients_have_the_inputs_dtype():
    a, b = Tensor(np.ones(3, np.float32), True), Tensor(np.ones(3), True)
    y = a * b
    y.sum().backward()
    assert y.dtype == np.float64 and a.grad.dtype == np.float32 and b.grad.dtype == np.float64


# Arrays, numbers and operators.


def test_operators_with_arrays_and_numbers_on_either_side():
    t = Tensor(np.array([[1.0, 2.0], [3.0, 4.0]]), requires_grad=True)
    a = np.array([[5.0, 6.0], [7.0, 8.0]])
    for other in (a, 3.0, 3, np.float64(3), np.array(3.0), Tensor(a)):
        x = other.data if isinstance(other, Tensor) else other
        for result, expected in [
            (t + other, t.data + x), (other + t, x + t.data), (t - other, t.data - x), (other - t, x - t.data),
            (t * other, t.data * x), (other * t, x * t.data), (t / other, t.data / x), (other / t, x / t.data),
        ]:  # fmt: skip
            assert isinstance(result, Tensor) and np.array_equal(result.data, expected) and result.requires_grad
    for result, expected in [(t @ a, t.data @ a), (a @ t, a @ t.data), (-t, -t.data), (t**2, t.data**2), (t.T, t.data.T), (t[0], t.data[0])]:
        assert isinstance(result, Tensor) and np.array_equal(result.data, expected)
    assert len(t) == 2 and [row.data.tolist() for row in t] == [[1.0, 2.0], [3.0, 4.0]]


def test_methods_are_the_ops():
    t = leaf(2, 3)
    assert t.sum(axis=0).shape == (3,) and t.mean().shape == () and t.reshape(3, 2).shape == t.reshape((3, -1)).shape == (3, 2)
    assert t.transpose(1, 0).shape == t.transpose().shape == t.swapaxes(0, 1).shape == (3, 2)
    assert t.exp().log().shape == t.tanh().abs().shape == (2, 3) and t.max(axis=1).shape == t.min(axis=1).shape == t.var(axis=1).shape == (2,)
    assert t[:, [0, 2]].shape == (2, 2) and t[Tensor(np.array([1, 1]))].shape == (2, 3)


def test_numpy_functions_refuse_a_tensor():
    """Without this NumPy would walk through it element by element and return an array of objects."""
    with pytest.raises(TypeError):
        np.exp(leaf(2))
    array = np.ones(2)
    with pytest.raises(TypeError):
        np.add(array, leaf(2), out=array)


def test_a_numpy_scalar_does_not_promote_float32():
    t = Tensor(np.ones((2, 3, 4, 4), np.float32), requires_grad=True)
    for y in (t * np.sqrt(2), np.float64(2) * t, t / np.float64(3), ops.attention(t, t, t, scale=1 / np.sqrt(4)), ops.pow(t, exponent=np.float64(2))):
        assert y.dtype == np.float32


def test_optional_arrays_may_be_given_by_name():
    x, b = leaf(3, 4), leaf(4, seed=1)
    y = ops.layernorm(x, b=b)
    assert np.array_equal(y.data, ops.layernorm(x, None, b).data)
    y.sum().backward()
    assert b.grad.tolist() == [3.0] * 4
    with pytest.raises(TypeError, match=r"add\(\) needs its first 2 arguments: a, b"):
        ops.add(x)
    with pytest.raises(TypeError):
        ops.layernorm(x, bias=b)


def test_a_gradient_is_not_lost_in_a_setting():
    x, n = leaf(3), Tensor(2.0, requires_grad=True)
    with pytest.raises(TypeError, match=r"pow\(\): no gradient flows through the setting 'exponent'.*detach"):
        x**n
    with no_grad():
        assert np.array_equal((x**n).data, x.data**2)
    assert np.array_equal((x ** n.detach()).data, x.data**2)


def test_truth_and_iteration_are_those_of_arrays():
    assert not Tensor([0.0]) and Tensor(1.0) and [row.shape for row in leaf(2, 3)] == [(3,), (3,)]
    with pytest.raises(ValueError, match="truth value"):
        bool(leaf(2))
    with pytest.raises(TypeError):
        iter(Tensor(1.0))


def test_dtypes_of_new_tensors():
    assert Tensor([1, 2]).dtype == Tensor(1).dtype == Tensor(2.5).dtype == np.float32
    assert Tensor(np.arange(3)).dtype == np.int64 and Tensor(np.float64(1)).dtype == np.float64
    assert Tensor([[1.5]]).item() == 1.5
    with pytest.raises(TypeError, match="use .detach"):
        Tensor(Tensor(1.0))
    assert repr(leaf(2)).endswith("requires_grad=True)") and "op=mul" in repr(leaf(2) * 2.0)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex128])
def test_only_floating_point_values_can_have_a_gradient(dtype):
    with pytest.raises(ValueError, match=f"only floating-point values can have a gradient, got {np.dtype(dtype)}"):
        Tensor(np.ones(3, dtype), requires_grad=True)


# no_grad and detach.


def test_no_grad_records_nothing():
    x = leaf(3)
    with no_grad():
        y = x * 2.0
        with no_grad():
            pass
        z = x * 2.0
    assert not y.requires_grad and z.node is None
    assert (x * 2.0).requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError  # the switch is put back whatever happens
    assert (x * 2.0).requires_grad

    @no_grad()
    def evaluate():
        return x * 2.0

    assert not evaluate().requires_grad and not evaluate().requires_grad


def test_detach_stops_the_gradient_and_shares_the_values():
    x = leaf(3)
    y = x * 2.0
    (y.detach() * y).sum().backward()
    assert np.allclose(x.grad, y.data * 2)  # one of the two factors counts as a constant
    assert y.detach().data is y.data and not y.detach().requires_grad


# backward()'s errors.


def test_backward_needs_a_gradient_of_the_right_shape():
    y = leaf(2, 3) * 2.0
    with pytest.raises(ValueError, match=r"from a Tensor of shape \(2, 3\) needs the upstream gradient"):
        y.backward()
    for shape in [(3, 2), (3,), (1, 1), (2, 3, 1)]:
        with pytest.raises(ValueError, match="upstream gradient has shape"):
            y.backward(np.ones(shape))
    with pytest.raises(ValueError, match="upstream gradient has shape"):
        y.sum().backward(np.ones(1))
    y.backward(Tensor(np.ones((2, 3))))  # the refused calls have used nothing up


def test_a_number_as_gradient_stands_for_all_elements():
    x = leaf(2, 3)
    (x * 2.0).backward(3.0)
    assert (x.grad == 6).all()


def test_backward_without_anything_to_differentiate():
    with pytest.raises(RuntimeError, match="depends on nothing with requires_grad"):
        (Tensor(np.ones(2)) * 2.0).sum().backward()


def test_a_second_backward_says_what_to_do():
    x = leaf(3)
    h = ops.exp(x)
    loss, other = h.sum(), (h * 2.0).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="'sum'.*used and freed: run the forward again"):
        loss.backward()
    with pytest.raises(RuntimeError, match="'exp'.*used and freed"):
        other.backward()  # the part of the graph that both share is gone


def test_an_op_with_the_wrong_number_of_gradients():
    @op
    def forgetful(a, b):
        return a * b, lambda dy: dy * b

    with pytest.raises(RuntimeError, match="backward of 'forgetful' returned 1 gradients for 2 inputs"):
        forgetful(leaf(2), leaf(2)).sum().backward()


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 3), (4, 2, 5), (2, 1)])
def test_an_op_with_a_gradient_of_the_wrong_shape(shape):
    @op
    def misshapen(x):
        return x * 1.0, lambda dy: np.ones(shape)

    with pytest.raises(RuntimeError, match=r"'misshapen' returned a gradient of shape .* for an input of shape \(2, 3\)"):
        misshapen(leaf(2, 3)).sum().backward()


def test_two_ops_of_one_name_are_refused_in_the_package_but_not_of_users():
    def add(a, b):
        return a, lambda dy: (dy, None)

    op(add)
    add.__module__ = "tinyllm.ops.elementwise"
    with pytest.raises(ValueError, match="an op named 'add' exists already"):
        op(add)
    assert OPS["add"] is ops.add


# Values changed in place.


def change(t):
    with no_grad():
        t[...] = 0.0


@pytest.mark.parametrize("changed", ["input", "result", "detached input", "view of the input", "source of the input"])
def test_a_change_in_place_before_backward_is_an_error(changed):
    x = leaf(4)
    h = x[1:] * 1.0
    part = h[:2]
    y = ops.exp(part)
    change({"input": part, "result": y, "detached input": part.detach(), "view of the input": part[:1], "source of the input": h}[changed])
    with pytest.raises(RuntimeError, match="'exp'.*changed in place after the op had saved"):
        y.backward(1.0)


def test_a_change_before_the_forward_or_after_backward_is_fine():
    x = leaf(3)
    change(x)
    ops.exp(x).sum().backward()
    change(x)
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_writing_where_a_gradient_would_get_lost_is_refused():
    x, buffer = leaf(3), Tensor(np.zeros(3))
    with pytest.raises(RuntimeError, match="writing to or from a Tensor that requires a gradient"):
        x[0] = 1.0
    with pytest.raises(RuntimeError, match="writing to or from a Tensor that requires a gradient"):
        buffer[...] = x
    buffer[1] = 2.0
    buffer[Tensor(np.array([0, 2]))] = Tensor(np.array([5.0, 6.0]))
    assert buffer.data.tolist() == [5.0, 2.0, 6.0]


# Gradients that are written where they belong.


def into(calls, own_add=True):
    """An op, y = 3·x, whose gradient is an `Into` that notes what it is asked for and with which array."""

    def write(dy):
        def write_into(out):
            calls.append(("write", out))
            np.multiply(dy, 3.0, out=out)

        return write_into

    def add(dy):
        def add_to(out):
            calls.append(("add", out))
            out += 3.0 * dy

        return add_to if own_add else None

    @op
    def three_times(x):
        return 3.0 * x, lambda dy: Into(write(dy), add(dy))

    return three_times


def buffered(*shape):
    x = leaf(*shape)
    x.buffer = np.full(shape, np.nan)  # whatever its last use left
    return x


@pytest.mark.parametrize("own_add", [True, False])
def test_into_writes_a_leafs_first_gradient_into_its_buffer_and_adds_the_others(own_add):
    x, calls = buffered(4, 5), []
    function = into(calls, own_add)
    function(x).backward(2.0)
    assert [name for name, _ in calls] == ["write"] and calls[0][1] is x.buffer and x.grad is x.buffer and (x.grad == 6).all()
    function(x).backward(1.0)
    assert calls[1][0] == ("add" if own_add else "write") and (calls[1][1] is x.buffer) == own_add
    assert x.grad is x.buffer and (x.grad == 9).all()
    x.grad = None
    (function(x) + function(x) + x).backward(1.0)  # one graph, and a gradient of the usual kind among them
    assert x.grad is x.buffer and (x.grad == 7).all()


def test_into_makes_no_array_of_the_parameters_size():
    x, function = buffered(1000, 1000), into([])
    loss = function(x).sum()
    dy = np.broadcast_to(np.float64(1), x.shape)

    @op
    def plain(x):
        return 3.0 * x, lambda dy: 3.0 * dy

    def peak(y):
        x.grad = None
        tracemalloc.start()
        try:
            y.backward(dy)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert loss.shape == ()
    assert peak(function(x)) < x.data.nbytes / 100 and peak(plain(x)) > 0.99 * x.data.nbytes


def test_into_without_a_buffer_or_on_the_way_is_an_array():
    x, calls = leaf(3), []
    function = into(calls)
    function(x).backward(1.0)
    first = x.grad
    assert (first == 3).all() and first.base is None
    function(x).backward(1.0)
    assert x.grad is first and (first == 6).all()
    x, calls[:] = buffered(3), []
    h = x * 2.0
    (function(h) + h).backward(1.0)  # not a leaf: its gradient waits for the other part
    assert (x.grad == 8).all() and calls[0][1] is not x.buffer
    x, frozen = leaf(2, 3), Tensor(np.ones(3))
    calls.clear()
    (function(x + frozen) * function(frozen)).backward(1.0)
    assert (x.grad == 9).all() and [name for name, _ in calls] == ["write"]


def test_into_has_the_dtype_and_shape_of_the_input():
    """The sum of a broadcast, and a cast, happen outside: write() gets the input's own kind of array."""
    x, calls = Tensor(np.ones((1, 3), np.float32), requires_grad=True), []
    function = into(calls)
    y = function(x) + np.ones((4, 3))
    y.backward(np.ones((4, 3)))
    ((_, out),) = calls
    assert (out.dtype, out.shape) == (np.float32, (1, 3)) and x.grad.dtype == np.float32 and (x.grad == 12).all()


def test_into_under_detect_anomaly_is_looked_at():
    x, calls = buffered(3), []
    function = into(calls)
    with detect_anomaly():
        function(x).backward(2.0)
        assert (x.grad == 6).all() and calls[0][1] is not x.buffer

        @op
        def broken(x):
            return x * 1.0, lambda dy: Into(lambda out: out.fill(np.inf))

        with pytest.raises(FloatingPointError, match="the backward of 'broken' for its input 0 made NaN or infinity"):
            broken(x).backward(1.0)


def test_a_buffer_takes_plain_gradients_too():
    x = buffered(2, 3)
    y = x + np.zeros((4, 2, 3))
    dy = np.random.default_rng(1).standard_normal((4, 2, 3))
    y.backward(dy)
    assert x.grad is x.buffer and np.array_equal(x.grad, dy.sum(0)) and not np.shares_memory(x.grad, dy)
    x.backward(1.0)
    assert x.grad is x.buffer and np.array_equal(x.grad, dy.sum(0) + 1)


# Backwards that hand out their gradients one by one.


def test_a_generator_hands_out_gradients_in_its_own_order_and_each_is_taken_at_once():
    a, b, events = leaf(3), leaf(2, 3), []

    @op
    def product(a, b):
        def backward(dy):
            yield 1, dy * a
            events.append(b_leaf.grad.copy())  # taken before the next is computed
            yield 0, lambda: dy * b  # of b's shape: summed back
            events.append(a_leaf.grad.copy())

        return a * b, backward

    a_leaf, b_leaf = a, b
    dy = np.random.default_rng(2).standard_normal((2, 3))
    product(a, b).backward(dy)
    np.testing.assert_array_equal(a.grad, (dy * b.data).sum(0))
    np.testing.assert_array_equal(b.grad, dy * a.data)
    assert [g.shape for g in events] == [(2, 3), (3,)]


def test_a_generator_computes_nothing_for_frozen_inputs():
    made = []

    def costly(name, gradient):
        return lambda: made.append(name) or gradient

    @op
    def add_all(a, b, c):
        def backward(dy):
            yield 2, costly("c", dy * 1)
            yield 0, costly("a", dy * 1)
            yield 1, costly("b", dy * 1)

        return a + b + c, backward

    a, c = Tensor(np.ones(2)), leaf(2)
    add_all(a, 2.0, c).backward(1.0)
    assert made == ["c"] and a.grad is None and c.grad.tolist() == [1, 1]


def test_a_generators_gradients_are_not_shared():
    """dy itself may be handed out, to several inputs even; what is added to one of them shows up nowhere else."""

    @op
    def both(a, b):
        def backward(dy):
            yield 0, dy
            yield 1, dy

        return a + b, backward

    a, b = leaf(3), leaf(3)
    p, q = a * 1.0, b * 1.0
    earlier = p * 5.0  # so that its part reaches p after that of both()
    dy = np.ones(3)
    (both(p, q) + earlier).backward(dy)
    both(a, b).backward(dy)
    assert a.grad.tolist() == [7, 7, 7] and b.grad.tolist() == [2, 2, 2] and dy.tolist() == [1, 1, 1]


def test_what_a_generator_lets_go_is_freed_before_it_goes_on(without_collector):
    alive = []

    @op
    def wasteful(x, y):
        def backward(dy):
            large, kept = np.ones(1000), np.ones(1000)
            refs = [weakref.ref(large), weakref.ref(kept)]
            yield 0, dy * large.sum()
            del large
            alive.append([ref() is not None for ref in refs])
            yield 1, dy * kept.sum()

        return x + y, backward

    x, y = leaf(2), leaf(2)
    wasteful(x, y).backward(1.0)
    assert alive == [[False, True]] and x.grad.tolist() == y.grad.tolist() == [1000, 1000]


def test_a_generator_with_into_under_detect_anomaly():
    @op
    def scaled(x, w):
        def backward(dy):
            yield 1, Into(lambda out: np.multiply(dy, x, out=out))
            yield 0, dy * w

        return x * w, backward

    x, w = leaf(3, seed=1), buffered(3)
    for _ in range(2):
        with detect_anomaly():
            scaled(x, w).backward(1.0)
        scaled(x, w).backward(1.0)
    np.testing.assert_allclose(w.grad, 4 * x.data)
    np.testing.assert_allclose(x.grad, 4 * w.data)


def test_enable_grad_records_inside_no_grad_and_only_there():
    x = leaf(2)
    with no_grad():
        with enable_grad():
            assert recording()
            y = x * 2.0
            with no_grad():
                assert not recording() and not (x * 2.0).requires_grad
        assert not recording() and not (x * 2.0).requires_grad
        with pytest.raises(KeyError), enable_grad():
            raise KeyError
        assert not recording()
    assert recording()
    y.backward(1.0)
    assert x.grad.tolist() == [2, 2]


# Memory: what dies when.


@pytest.fixture
def without_collector():
    """Only reference counts free memory: a cycle would keep it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def watch(array):
    """A weak reference to the memory of an array."""
    return weakref.ref(array if array.base is None else array.base)


def test_an_activation_that_no_backward_needs_dies_at_once(without_collector):
    x = leaf(100)
    h = x + 1.0
    seen = [watch(h.data)]
    for function in (
        lambda h: h + 2.0, lambda h: ops.neg(h), lambda h: ops.mean(h), lambda h: h - 1.0, lambda h: ops.sum(h), lambda h: ops.expand(h, shape=(2, 3)),
        lambda h: ops.stack(h, h), lambda h: ops.concatenate(h, h), lambda h: h[np.array([0, 1, 1])], lambda h: ops.pad(h, widths=((1, 1), (0, 0), (0, 0))),
        lambda h: ops.gather(h, np.zeros((5, 1, 3), int), axis=1), lambda h: ops.dropout(h, rate=0.5, rng=np.random.default_rng(0)),
        lambda h: ops.clip(h, low=-1, high=1), lambda h: ops.masked_fill(h, np.ones((5, 1, 3), bool), value=0.0), lambda h: ops.relu(h),
    ):  # fmt: skip
        h = function(h)
        seen.append(watch(h.data))
        assert not any(ref() is not None for ref in seen if ref() is not seen[-1]()), seen
    h.sum().backward()
    assert x.grad.shape == (100,)


def test_reshape_keeps_no_activation_by_its_shape(without_collector):
    x = leaf(4, 5)
    h = x + 1.0
    ref = watch(h.data)
    y = h.T.reshape(20)  # a copy, since the elements change their order
    del h
    assert ref() is None
    y.sum().backward()


def test_activations_are_freed_as_backward_passes():
    alive = []

    @op
    def counted(x):
        saved = x * 2.0
        refs.append(weakref.ref(saved))

        def backward(dy):
            alive.append(sum(ref() is not None for ref in refs))
            return dy * saved

        return x + 1.0, backward

    refs = []
    h = leaf(10)
    for _ in range(6):
        h = counted(h)
    loss = h.sum()
    del h
    loss.backward()
    assert alive == [6, 5, 4, 3, 2, 1]
    assert not any(ref() for ref in refs)


def test_a_kept_loss_holds_nothing_after_backward():
    x = leaf(1000, 100)
    tracemalloc.start()
    try:
        h = x
        for _ in range(10):
            h = ops.tanh(h)  # each keeps 0.8 MB
        loss = h.sum()
        del h
        held = tracemalloc.get_traced_memory()[0]
        loss.backward()
        after = tracemalloc.get_traced_memory()[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held > 10 * x.data.nbytes
    assert after < 1.1 * x.data.nbytes  # the gradient of x alone
    assert peak < held + 4 * x.data.nbytes  # gradients do not pile up
    assert loss.node.backward is None and loss.node.parents == ()


def test_no_reference_cycles(without_collector):
    x, w = leaf(4, 5), leaf(3, 5)
    for finish in (lambda loss: None, lambda loss: loss.backward()):
        h = ops.softmax(ops.layernorm(ops.linear(x, w)))
        loss = ops.cross_entropy(h[:, None].reshape(4, 3), np.array([0, 1, 2, 0]))
        refs = [weakref.ref(h), watch(h.data), weakref.ref(loss)]
        finish(loss)
        del h, loss
        assert not any(ref() is not None for ref in refs)


def test_no_op_leaves_a_reference_cycle(without_collector):
    from tinyllm.ops.cases import CASES

    for case in CASES:
        arguments = [Tensor(x, x.dtype.kind == "f") if isinstance(x, np.ndarray) else x for x in case.arrays()]
        y = case.function(*arguments)
        ref = weakref.ref(y)
        y.backward(np.ones(y.shape))
        inputs = [weakref.ref(x) for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        del y, arguments
        assert ref() is None and not any(r() for r in inputs), case
