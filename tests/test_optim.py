"""AdamW and SGD: against PyTorch, against their definitions, and the invariants of both."""
from pathlib import Path

import numpy as np
import pytest
from device_worlds import real_cupy

from tinyllm.optim import SGD, AdamW, Optimizer, adamw, clip_factor, global_norm, sgd
from tinyllm.tensor import Tensor

GOLDEN = np.load(Path(__file__).parent / "golden" / "optim.npz")
RUNS = {
    "adamw": lambda p: AdamW(p),
    "adamw_big_eps": lambda p: AdamW(p, beta1=0.8, beta2=0.999, eps=0.1, weight_decay=0.5),
    "sgd": lambda p: SGD(p, momentum=0.0, weight_decay=0.1),
    "sgd_momentum": lambda p: SGD(p, momentum=0.9, weight_decay=0.1),
    "sgd_nesterov": lambda p: SGD(p, momentum=0.7, nesterov=True, weight_decay=0.2),
}
SHAPES = {"gain": (5,), "w": (5, 3), "scalar": (), "embedding": (7, 1, 2), "empty": (0, 4), "bias": (3,), "no_bias": (0,)}


def parameters(shapes=SHAPES, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return {name: Tensor(np.asarray(rng.standard_normal(shape), dtype=dtype), requires_grad=True) for name, shape in shapes.items()}


def set_gradients(params, rng):
    for p in params.values():
        p.grad = rng.standard_normal(p.shape).astype(p.dtype)


def values(params):
    return {name: p.data.copy() for name, p in params.items()}


def assert_bitwise(a, b):
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("run", RUNS)
def test_trajectories_are_pytorchs(run):
    params = {name: Tensor(GOLDEN[f"start.{name}"].copy(), requires_grad=True) for name in ("b", "w")}
    optimizer = RUNS[run](params.items())
    for step, lr in enumerate(GOLDEN["rates"]):
        for name, p in params.items():
            p.grad = GOLDEN[f"gradients.{name}"][step]
        optimizer.step(lr)
        for name, p in params.items():
            np.testing.assert_allclose(p.data, GOLDEN[f"{run}.{name}"][step], rtol=1e-13, atol=1e-14)
    assert optimizer.steps == len(GOLDEN["rates"])


@pytest.mark.peers
@pytest.mark.parametrize("run", RUNS)
def test_long_float32_runs_stay_beside_pytorchs(run):
    torch = pytest.importorskip("torch")
    ours = parameters({"w": (301, 257), "b": (257,)}, np.float32)
    theirs = {name: torch.nn.Parameter(torch.tensor(p.data)) for name, p in ours.items()}
    optimizer = RUNS[run](ours.items())
    settings = {"weight_decay": optimizer.weight_decay, "lr": 1.0}
    if isinstance(optimizer, AdamW):
        kind, settings = torch.optim.AdamW, settings | {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}
    else:
        kind, settings = torch.optim.SGD, settings | {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
    reference = kind([{"params": [theirs["w"]]}, {"params": [theirs["b"]], "weight_decay": 0.0}], **settings)
    rng = np.random.default_rng(1)
    for step in range(100):
        set_gradients(ours, rng)
        for name, p in ours.items():
            theirs[name].grad = torch.tensor(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 50.0).item()
        assert global_norm(optimizer.flat.grad) == pytest.approx(norm, rel=1e-5)
        for group in reference.param_groups:
            group["lr"] = 0.01 / (1 + step)
        reference.step()
        optimizer.step(0.01 / (1 + step), grad_scale=clip_factor(norm, 50.0))
    for name, p in ours.items():
        np.testing.assert_allclose(p.data, theirs[name].detach().numpy(), rtol=1e-5, atol=2e-6)


def definition(optimizer, p, g, state, step, lr):
    """One step of the plain function for one parameter; state is the list of its running means."""
    decay = optimizer.weight_decay if p.ndim >= 2 else 0.0
    if isinstance(optimizer, AdamW):
        betas = dict(beta1=optimizer.beta1, beta2=optimizer.beta2, eps=optimizer.eps)
        p, *state = adamw(p, g, *state, step=step, lr=lr, weight_decay=decay, **betas)
    else:
        p, *state = sgd(p, g, *state[:1], lr=lr, momentum=optimizer.momentum, nesterov=optimizer.nesterov, weight_decay=decay)
    return p, state


@pytest.mark.parametrize("run", RUNS)
def test_flat_update_equals_the_definition_over_several_blocks(run):
    params = parameters(SHAPES | {"big": (300, 500), "long": (70_001,)})
    plain, states = values(params), {name: [np.zeros(p.shape), np.zeros(p.shape)] for name, p in params.items()}
    optimizer = RUNS[run](params.items())
    assert len(optimizer.flat.blocks) > 4
    rng = np.random.default_rng(1)
    for step in range(1, 6):
        set_gradients(params, rng)
        for name, p in params.items():
            plain[name], states[name] = definition(optimizer, plain[name], 0.25 * p.grad, states[name], step, 0.1 / step)
        optimizer.step(0.1 / step, grad_scale=0.25)
    for name, p in params.items():
        np.testing.assert_allclose(p.data, plain[name], rtol=1e-14, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6, 1e15])
def test_first_step_of_adamw_moves_each_weight_by_lr_against_its_gradient(size):
    params = parameters(dtype=np.float32)
    before = values(params)
    optimizer = AdamW(params.items(), weight_decay=0.0, eps=1e-30)
    rng = np.random.default_rng(1)
    for p in params.values():
        p.grad = (size * rng.standard_normal(p.shape)).astype(p.dtype)
    optimizer.step(0.125)
    for name, p in params.items():
        np.testing.assert_allclose(p.data - before[name], -0.125 * np.sign(p.grad), rtol=1e-4, atol=1e-6)


def test_adamw_does_not_care_for_the_scale_of_the_gradient():
    one, other = parameters(), parameters()
    a, b = AdamW(one.items(), eps=1e-60), AdamW(other.items(), eps=1e-60)
    for step in range(4):
        set_gradients(one, np.random.default_rng(step))
        set_gradients(other, np.random.default_rng(step))
        a.step(0.1)
        b.step(0.1, grad_scale=2.0**40)
    for name in one:
        np.testing.assert_allclose(one[name].data, other[name].data, rtol=1e-14)


@pytest.mark.parametrize("run", RUNS)
def test_without_gradient_matrices_shrink_and_vectors_stay(run):
    params = parameters()
    before = values(params)
    optimizer = RUNS[run](params.items())
    optimizer.step(0.5)
    for name, p in params.items():
        if p.ndim >= 2 and p.size:
            np.testing.assert_array_less(np.abs(p.data), np.abs(before[name]))
            if isinstance(optimizer, AdamW):
                np.testing.assert_allclose(p.data, before[name] * (1 - 0.5 * optimizer.weight_decay), rtol=1e-15)
        else:
            assert (p.data == before[name]).all()


@pytest.mark.parametrize("run", RUNS)
def test_grad_scale_is_a_factor_on_the_gradients(run):
    one, other = parameters(dtype=np.float32), parameters(dtype=np.float32)
    a, b = RUNS[run](one.items()), RUNS[run](other.items())
    for step in range(3):
        set_gradients(one, np.random.default_rng(step))
        set_gradients(other, np.random.default_rng(step))
        b.flat.grad[...] *= 2.0**10  # a power of two: exact
        a.step(0.1)
        b.step(0.1, grad_scale=2.0**-10)
    assert_bitwise(values(one), values(other))


def test_numpy_scalars_do_not_change_the_result():
    one, other = parameters(dtype=np.float32), parameters(dtype=np.float32)
    a, b = AdamW(one.items()), AdamW(other.items())
    a.step(0.1, 0.5)
    b.step(np.float64(0.1), np.float64(0.5))
    assert_bitwise(values(one), values(other))


@pytest.mark.parametrize("run", RUNS)
def test_a_loaded_state_goes_on_bitwise_whatever_the_order_of_the_parameters(run):
    rngs = [np.random.default_rng(step) for step in range(6)]
    params = parameters(dtype=np.float32)
    optimizer = RUNS[run](params.items())
    for step in range(3):
        set_gradients(params, rngs[step])
        optimizer.step(0.1)
    saved = {name: array.copy() for name, array in optimizer.state_dict().items()}
    again = {name: Tensor(params[name].data.copy(), requires_grad=True) for name in reversed(params)}
    resumed = RUNS[run](again.items())
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        set_gradients(params, rngs[step])
        for name, p in params.items():
            again[name].grad = p.grad
        optimizer.step(0.1)
        resumed.step(0.1)
    assert resumed.steps == 6
    assert_bitwise(values(params), {name: again[name].data for name in params})
    assert_bitwise(optimizer.state_dict(), {name: resumed.state_dict()[name] for name in optimizer.state_dict()})


def test_state_is_named_by_parameter():
    params = parameters({"w": (2, 3), "b": (3,), "frozen": (4, 4)})
    params["frozen"].requires_grad = False
    assert {name: array.shape for name, array in AdamW(params.items()).state_dict().items()} == {
        "exp_avg.w": (2, 3), "exp_avg.b": (3,), "exp_avg_sq.w": (2, 3), "exp_avg_sq.b": (3,), "step": (),
    }  # fmt: skip
    assert set(SGD(parameters({"w": (2, 3)}).items()).state_dict()) == {"momentum.w", "step"}
    assert set(SGD(parameters({"w": (2, 3)}).items(), momentum=0.0).state_dict()) == {"step"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("exp_avg.w"), r"'exp_avg\.w' is missing \(saved for another model or optimizer\?\)"),
        (lambda state: state.pop("step"), "'step' is missing"),
        (lambda state: state.update({"exp_avg.q": np.zeros(3)}), r"unknown entry 'exp_avg\.q'; did you mean exp_avg\.[wb]\?"),
        (lambda state: state.update({"exp_avg_sq.w": np.zeros((3, 2))}), r"'exp_avg_sq\.w' has shape \(3, 2\) .* expected \(2, 3\)"),
        (lambda state: state.update({"exp_avg.b": np.zeros(3, np.float32)}), "dtype float32, expected .* float64"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, message):
    params = parameters({"w": (2, 3), "b": (3,)})
    optimizer = AdamW(params.items())
    set_gradients(params, np.random.default_rng(0))
    optimizer.step(0.1)
    before = {name: array.copy() for name, array in optimizer.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_bitwise(before, optimizer.state_dict())


@pytest.mark.parametrize("arguments", [(-0.1, 1.0), (float("nan"), 1.0), (0.1, float("inf")), (0.1, float("nan")), (float("inf"), 1.0)])
def test_an_update_that_would_destroy_the_weights_is_refused(arguments):
    params = parameters()
    optimizer = AdamW(params.items())
    before = values(params)
    with pytest.raises(ValueError, match="needs a finite lr and grad_scale ≥ 0, got lr"):
        optimizer.step(*arguments)
    assert_bitwise(before, values(params))
    assert optimizer.steps == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamW(p, beta1=1.0), lambda p: AdamW(p, beta2=-0.1), lambda p: AdamW(p, eps=0.0), lambda p: AdamW(p, weight_decay=-1),
        lambda p: AdamW(p, beta1=float("nan")), lambda p: SGD(p, momentum=1.0), lambda p: SGD(p, weight_decay=-1),
        lambda p: SGD(p, momentum=0.0, nesterov=True),
    ],
)  # fmt: skip
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match="AdamW takes|SGD takes|SGD with nesterov"):
        make(parameters().items())


def test_the_base_class_has_no_formula():
    with pytest.raises(TypeError, match="abstract"):
        Optimizer(parameters().items(), ())


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS)
def test_the_gpu_follows_the_cpu(run):
    cupy = real_cupy()
    host = parameters(dtype=np.float32)
    device = {name: Tensor(cupy.asarray(p.data), requires_grad=True) for name, p in host.items()}
    a, b = RUNS[run](host.items()), RUNS[run](device.items())
    for step in range(5):
        set_gradients(host, np.random.default_rng(step))
        for name, p in host.items():
            device[name].grad = cupy.asarray(p.grad)
        assert global_norm(b.flat.grad) == pytest.approx(global_norm(a.flat.grad), rel=1e-12)
        a.step(0.1)
        b.step(0.1)
    b.load_state_dict(b.state_dict())
    for name, p in host.items():
        np.testing.assert_allclose(device[name].numpy(), p.data, rtol=1e-5, atol=1e-6)
