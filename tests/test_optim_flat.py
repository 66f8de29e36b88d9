"""The flat buffers: every parameter stays a view, through real backward passes, and whoever breaks that is told."""
import numpy as np
import pytest

from tinyllm.ops import linear, rmsnorm
from tinyllm.optim import SGD, AdamW, FlatParameters
from tinyllm.tensor import Tensor


def tensor(*shape, requires_grad=True, dtype=np.float32, seed=0):
    return Tensor(np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=dtype), requires_grad=requires_grad)


def model():
    return {"gain": tensor(4, seed=1), "w": tensor(3, 4, seed=2), "frozen": tensor(4, 4, requires_grad=False, seed=3), "v": tensor(1, 3, seed=4)}


def loss_of(params, x):
    hidden = linear(rmsnorm(linear(x, params["frozen"]), params["gain"]), params["w"])
    return (linear(hidden, params["v"]) ** 2).mean()


def test_decayed_parameters_come_first_in_the_given_order():
    params = model() | {"scalar": tensor(), "empty": tensor(0, 3), "cube": tensor(2, 2, 2)}
    before = {name: p.data.copy() for name, p in params.items()}
    flat = FlatParameters(params.items())
    assert list(flat.tensors) == ["w", "v", "empty", "cube", "gain", "scalar"]
    assert flat.decayed == 12 + 3 + 0 + 8 and flat.data.size == flat.decayed + 4 + 1
    assert all((p.data == before[name]).all() and p.data.shape == before[name].shape for name, p in params.items())
    np.testing.assert_array_equal(flat.data, np.concatenate([before[name].ravel() for name in flat.tensors]))
    for name, p in flat.tensors.items():
        assert p.size == 0 or (np.shares_memory(p.data, flat.data) and np.shares_memory(p.buffer, flat.grad)), name
    assert not np.shares_memory(params["frozen"].data, flat.data) and params["frozen"].grad is None


def test_blocks_cover_every_element_once_and_never_mix_decay():
    flat = FlatParameters([("b", tensor(70_000)), ("w", tensor(256, 513))])
    indices = np.concatenate([np.arange(flat.data.size)[block] for block, _ in flat.blocks])
    np.testing.assert_array_equal(indices, np.arange(flat.data.size))
    assert all((block.stop <= flat.decayed) == decays for block, decays in flat.blocks)
    assert max(block.stop - block.start for block, _ in flat.blocks) == 2**16


def test_backward_adds_into_the_views():
    params, plain = model(), model()
    optimizer = AdamW(params.items())
    for seed in (5, 6):
        x = tensor(2, 4, requires_grad=False, seed=seed)
        loss_of(params, x).backward()
        loss_of(plain, x).backward()
    optimizer.flat.check_attached()
    for name, p in optimizer.flat.tensors.items():
        np.testing.assert_array_equal(p.grad, plain[name].grad)
    np.testing.assert_array_equal(optimizer.flat.grad, np.concatenate([plain[name].grad.ravel() for name in optimizer.flat.tensors]))
    optimizer.zero_grad()
    assert all(p.grad is None for p in optimizer.flat.tensors.values()) and not optimizer.flat.grad.any()


def test_gradients_from_before_the_optimizer_are_kept():
    params = model()
    loss_of(params, tensor(2, 4, requires_grad=False)).backward()
    before = {name: p.grad.copy() for name, p in params.items() if p.requires_grad}
    flat = FlatParameters(params.items())
    assert all((flat.tensors[name].grad == g).all() for name, g in before.items())


def test_training_lowers_the_loss_and_leaves_frozen_parameters_alone():
    for make in (lambda p: AdamW(p, weight_decay=0.0), lambda p: SGD(p, nesterov=True)):
        params = model()
        frozen = params["frozen"].data
        copy = frozen.copy()
        optimizer, x, losses = make(params.items()), tensor(16, 4, requires_grad=False), []
        for _ in range(100):
            loss = loss_of(params, x)
            losses.append(loss.item())
            loss.backward()
            optimizer.step(0.02)
            optimizer.zero_grad()
        assert losses[-1] < 1e-3 * losses[0]
        assert params["frozen"].data is frozen and (frozen == copy).all() and params["frozen"].version.count == 0


def test_backward_through_a_graph_from_before_the_update_is_refused():
    params = model()
    optimizer = AdamW(params.items())
    loss = loss_of(params, tensor(2, 4, requires_grad=False))
    optimizer.step(0.1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: setattr(p, "data", p.data.copy()), r"'w': \.data was replaced .* write p\.data\[\.\.\.\] = value"),
        (lambda p: FlatParameters([("w", p)]), r"'w': \.data was replaced .* only one for a model"),
        (lambda p: setattr(p, "requires_grad", False), "'w' was frozen after the optimizer was made"),
    ],
)
def test_a_detached_parameter_is_reported_before_anything_changes(break_it, message):
    params = model()
    optimizer = AdamW(params.items())
    optimizer.flat.grad[...] += 1
    break_it(params["w"])
    before = optimizer.flat.data.copy()
    for act in (optimizer.zero_grad, lambda: optimizer.step(0.1)):
        with pytest.raises(RuntimeError, match=message):
            act()
    assert (optimizer.flat.data == before).all() and optimizer.steps == 0


def test_writing_values_in_place_and_setting_gradients_is_fine():
    params = model()
    optimizer = SGD(params.items(), momentum=0.0)
    params["w"].data[...] = 1.0
    params["w"].grad = np.ones(params["w"].shape)
    optimizer.step(0.25)
    assert (params["w"].data == 0.75).all()
    params["w"].grad = None  # none counts as 0
    optimizer.step(0.25)
    assert (params["w"].data == 0.75).all() and not optimizer.flat.grad.any()
    params["w"].grad = np.ones(1)
    with pytest.raises(ValueError, match=r"'w' has the shape \(3, 4\), its gradient \(1,\)"):
        optimizer.step(0.25)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (lambda: [], "no parameter that requires a gradient"),
        (lambda: [("w", tensor(2, requires_grad=False))], "is the whole model frozen"),
        (lambda: [("w", tensor(2)), ("w", tensor(3))], "two parameters named 'w'"),
        (lambda: [("a", t := tensor(2)), ("b", t)], "one parameter twice, as 'a' and 'b'"),
        (lambda: [("w", tensor(2, dtype=np.float16))], "'w' is float16: .* float32"),
        (lambda: [("a", tensor(2)), ("b", tensor(2, dtype=np.float64))], r"'a' \(numpy float32\) and 'b' \(numpy float64\) cannot share"),
    ],
)
def test_parameters_that_cannot_be_gathered(named, message):
    with pytest.raises(ValueError, match=message):
        FlatParameters(named())


def test_a_model_of_empty_parameters_can_take_a_step():
    optimizer = AdamW([("empty", tensor(0, 3))])
    optimizer.zero_grad()
    optimizer.step(0.1)
    assert optimizer.state_dict()["exp_avg.empty"].shape == (0, 3)


def test_a_refused_step_does_not_count():
    params = model()
    optimizer = AdamW(params.items())
    params["w"].grad = np.ones(1)
    with pytest.raises(ValueError, match="its gradient"):
        optimizer.step(0.1)
    assert optimizer.steps == 0
