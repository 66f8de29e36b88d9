"""What follows from a gradient on the device: held to optim.Control, AdamW and LossScaler over steps with and without overflow."""
import math
import re

import numpy as np
import pytest

from tinyllm.backend import array_module
from tinyllm.kernels.cuda import adamw, halves, launch
from tinyllm.kernels.cuda.storage import dtype_of
from tinyllm.optim import SGD, AdamW, Control, LossScaler, OutlierDetector
from tinyllm.optim import adamw as by_definition
from tinyllm.tensor import Tensor

pytest.importorskip("ml_dtypes")  # makes NumPy know bf16

SHAPES = ([(3,)], [(1, 1)], [(2, 3), (5,)], [(31, 33), (7, 3), (5,), ()])  # flat sizes 3, 1, 11, 1050: matrices first; 6 and 1044 decay


def shapes(world):
    return world.size(SHAPES, (*SHAPES, [(50304, 768), (768,), (3,)]))


def optimizer(xp, sizes, kind=AdamW, **settings):
    random = np.random.default_rng(1)
    tensors = [(f"p{i}", Tensor(xp.asarray(np.asarray(random.standard_normal(shape), np.float32)), requires_grad=True)) for i, shape in enumerate(sizes)]
    return kind(tensors, **settings)


def set_gradient(opt, g):
    """Into the buffers, as backward() does it."""
    opt.flat.grad[...] = array_module(opt.flat.data).asarray(g)


def steps_of(size, count, bad=()):
    """(gradient, loss) of each step: of sizes over many orders. Of bad steps, the even ones' gradient is not finite, the odd ones' loss."""
    random = np.random.default_rng(2)
    for n in range(count):
        g = (random.standard_normal(size) * 10.0 ** random.integers(-6, 3)).astype(np.float32)
        g[random.integers(size)] *= 0  # Adam's 0/(0 + ε)
        if n in bad and n % 2 == 0:
            g[random.integers(size)] = random.choice([np.inf, -np.inf, np.nan])
        yield g, np.float32(random.choice([np.inf, np.nan]) if n in bad and n % 2 else random.uniform(1, 9))


def advance(control, g, loss, lr):
    """One step as Trainer does it, with the gradient of a loss times the control's scale."""
    opt = control.optimizer
    scale = float(control.scale)
    set_gradient(opt, g * np.float32(scale))
    control.step(loss, opt.square(), lr)


def close(ours, expected, tolerance=2e-6):
    return np.abs(ours.get() - expected).max(initial=0) <= tolerance * max(np.abs(expected).max(initial=0), 1e-30)


def test_state_is_numbered_alike_on_both_sides():
    names = re.search(r"enum \{(.*?)\};", (launch.FOLDER / "adamw.cu").read_text(), re.S)[1]
    assert tuple(re.findall(r"[A-Z_0-9]+", re.sub("//.*", "", names))) == tuple(name.upper() for name in adamw.STATE)
    assert f"#define BLOCK {adamw.BLOCK}\n" in (launch.FOLDER / "adamw.cu").read_text()


# The norm

@pytest.mark.parametrize("size", [1, 3, 4, 1023, 20000])
def test_sum_of_squares(world, size):
    size = world.size(size, size * 10007)
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32) * np.float32(10.0) ** np.random.default_rng(1).integers(-9, 9, size).astype(np.float32)
    ours = adamw.sum_of_squares(world.xp.asarray(x))
    assert ours.shape == () and ours.dtype == np.float64
    assert float(ours) == pytest.approx(math.fsum(x.astype(np.float64) ** 2), rel=1e-13)
    assert float(adamw.sum_of_squares(world.xp.asarray(x))) == float(ours)


def test_squares_beyond_float32_are_finite_and_bad_ones_are_not(world):
    x = np.full(3000, 3e38, np.float32)
    assert float(adamw.sum_of_squares(world.xp.asarray(x))) == pytest.approx(3000 * float(x[0]) ** 2, rel=1e-13)
    for bad in (np.inf, -np.inf, np.nan):
        x[2999] = bad
        assert not math.isfinite(float(adamw.sum_of_squares(world.xp.asarray(x))))


def test_every_block_goes_over_the_array_several_times(world):
    x = np.random.default_rng(0).standard_normal(2 * adamw.PARTS * 4 * adamw.BLOCK + 1031).astype(np.float32)
    assert float(adamw.sum_of_squares(world.xp.asarray(x))) == pytest.approx(float((x.astype(np.float64) ** 2).sum()), rel=1e-12)


def test_small_squares_are_not_lost_beside_a_large_one(world):
    x = np.ones(world.size(5000, 10**7), np.float32)
    x[0] = 1e7
    assert float(adamw.sum_of_squares(world.xp.asarray(x))) == 1e14 + len(x) - 1


# Steps

@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_run_with_overflows_equals_the_hosts(world, precision, clip):
    """Forty steps: weights, moments, scale, counts and what there is to log, step by step."""
    for sizes in shapes(world):
        ours, theirs = optimizer(world.xp, sizes, weight_decay=0.3), optimizer(np, sizes, weight_decay=0.3)
        bad = {3, 4, 11, 20, 21, 22} if precision == "fp16" else ()
        make = (lambda: LossScaler(2.0**10, growth_interval=4)) if precision == "fp16" else (lambda: LossScaler(1.0, None))
        device, host = ours.control(make(), clip=clip, precision=precision), theirs.control(make(), clip=clip)
        assert type(device) is adamw.DeviceControl and type(host) is Control
        for n, (g, loss) in enumerate(steps_of(theirs.flat.data.size, world.size(26, 12), bad)):
            lr = 0.1 / (n + 1)
            advance(device, g, world.xp.asarray(loss), lr)
            with np.errstate(all="ignore"):
                advance(host, g, loss, lr)
            a, b = device.read(), host.read()
            assert (a.skipped, a.later, a.scale) == (b.skipped, 0, b.scale) and (a.skipped == "overflow") == (n in bad)
            assert (a.loss, a.norm) == pytest.approx((b.loss, b.norm), rel=1e-12, nan_ok=True)
            assert device.scaler.state_dict() == host.scaler.state_dict() and ours.steps == theirs.steps
            assert close(ours.flat.data, theirs.flat.data)
            assert all(close(ours.state[name], theirs.state[name]) for name in ("exp_avg", "exp_avg_sq"))
        assert ours.steps == n + 1 - len(bad)


def test_one_update_by_definition(world):
    """In float64, of each element; matrices decay, vectors do not."""
    for sizes in shapes(world)[:4]:
        opt = optimizer(world.xp, sizes, weight_decay=0.5)
        before = {name: (p.data.get().astype(np.float64), p.ndim) for name, p in opt.flat.tensors.items()}
        control = opt.control(LossScaler(1.0, None))
        for g, loss in steps_of(opt.flat.data.size, 1):
            advance(control, g, world.xp.asarray(loss), 0.25)
            for (name, p), dp in zip(opt.flat.tensors.items(), opt.flat.views(g).values(), strict=True):
                start, axes = before[name]
                decay = 0.5 if axes >= 2 else 0.0
                expected, *_ = by_definition(start, dp.astype(np.float64), 0.0, 0.0, step=1, lr=0.25, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=decay)
                np.testing.assert_allclose(p.data.get(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_copies_hold_the_weights_after_every_step(world, precision):
    """Also after one that was left out, and where somebody else has changed the weights in between."""
    dtype = dtype_of(precision)
    for sizes in shapes(world):
        opt = optimizer(world.xp, sizes)
        control = opt.control(LossScaler(2.0**4, growth_interval=None), precision=precision)
        for n, (g, loss) in enumerate(steps_of(opt.flat.data.size, 4, bad={0, 2})):
            opt.flat.data[...] += 1.0 * (n == 2)
            opt.flat.mark_changed()
            advance(control, g, world.xp.asarray(loss), 0.1)
            for p, copy in zip(opt.flat.tensors.values(), control.copies, strict=True):
                assert halves.of(p, dtype) is copy and copy.dtype == dtype and copy.shape == p.shape
                assert np.array_equal(copy.get().astype(np.float32), p.data.get().astype(dtype).astype(np.float32))


@pytest.mark.parametrize("precision, wasted", [("fp32", 0), ("bf16", 0), ("fp16", 3)])
def test_divergence_stops_everything(world, precision, wasted):
    """The scale is halved as often as it can be; from the step on that found no smaller one nothing changes any more."""
    opt = optimizer(world.xp, [(31, 33), (5,)])
    control = opt.control(LossScaler(8.0, 100) if precision == "fp16" else LossScaler(1.0, None), precision=precision)
    good, *rest = steps_of(opt.flat.data.size, 8, bad=range(1, 9))
    advance(control, *good, 0.1)
    weights, moments = opt.flat.data.get().tobytes(), opt.state["exp_avg"].get().tobytes()
    for n, (g, loss) in enumerate(rest):
        advance(control, g, world.xp.asarray(loss), 0.1)
        verdict = control.read()
        assert (verdict.skipped, verdict.later) == (("overflow", 0) if n < wasted else ("divergence", n - wasted))
    set_gradient(opt, np.ones(opt.flat.data.size, np.float32))
    control.step(1.0, opt.square(), 0.1)  # also a good one
    verdict = control.read()
    assert verdict.skipped == "divergence" and verdict.scale == control.scaler.minimum
    assert not (math.isfinite(verdict.norm) and math.isfinite(verdict.loss))
    assert (weights, moments) == (opt.flat.data.get().tobytes(), opt.state["exp_avg"].get().tobytes()) and opt.steps == 1


def test_a_control_made_later_goes_on_bitwise(world):
    """From what a read brought back to the scaler and the optimizer: as a checkpoint does it."""
    one, two = (optimizer(world.xp, [(31, 33), (5,)]) for _ in range(2))
    a, b = (opt.control(LossScaler(2.0**8, growth_interval=3), clip=1.0, precision="fp16") for opt in (one, two))
    for n, (g, loss) in enumerate(steps_of(one.flat.data.size, 12, bad={2, 9})):
        advance(a, g, world.xp.asarray(loss), 0.1)
        advance(b, g, world.xp.asarray(loss), 0.1)
        if n in (1, 7):
            b.read()
            scaler = LossScaler(2.0**8, growth_interval=3)
            scaler.load_state_dict(b.scaler.state_dict())
            two.load_state_dict(two.state_dict())
            b = two.control(scaler, clip=1.0, precision="fp16")
    assert a.read() == b.read() and one.flat.data.get().tobytes() == two.flat.data.get().tobytes() and one.steps == two.steps == 10


def test_nothing_waits_but_the_read(world):
    if world.name == "gpu":
        pytest.skip("the fake device counts")
    xp = world.xp
    opt = optimizer(xp, [(2, 3), (5,)])
    control = opt.control(LossScaler(), clip=1.0, precision="fp16")
    opt.flat.grad[...] = 1.0
    with xp.forbidden():
        for _ in range(3):
            loss = xp.asarray(np.float32(1.0)) * (control.scale * 0.5)
            control.step(loss, opt.square(), 0.1)
    assert all(p.version.count == 3 for p in opt.flat.tensors.values())  # an older graph is not to be gone back through
    before = len(xp.synchronisations)
    assert control.read().later == 0 and len(xp.synchronisations) == before + 1


def test_34_bytes_a_parameter(world):
    """The head comment's bytes, counted."""
    if world.name == "gpu":
        pytest.skip("the emulator counts")
    import cuda_on_cpu

    opt = optimizer(world.xp, [(200, 256), (64,)])
    control = opt.control(LossScaler(1.0, None), precision="bf16")
    opt.flat.grad[...] = 1.0
    moved = cuda_on_cpu.traffic(lambda: control.step(1.0, opt.square(), 0.1))
    assert moved.beyond_ideal("global") == moved.beyond_ideal("shared") == 0
    assert moved.read + moved.written <= 34 * opt.flat.data.size + 2000


def test_before_the_first_step_there_is_nothing_to_read(world):
    control = optimizer(world.xp, [(2, 3)]).control(LossScaler())
    assert control.read() is None and control.scaler.scale == 2.0**16


def test_what_is_decided_on_the_host(world):
    """Outliers, other optimizers, other numbers: the host's control works on arrays of a device, and waits for them."""
    opt = optimizer(world.xp, [(2, 3)])
    assert type(opt.control(LossScaler(1.0, None), detectors={"loss": OutlierDetector()})) is Control
    plain = optimizer(world.xp, [(2, 3)], SGD, momentum=0.0)
    control = plain.control(LossScaler(1.0, None), clip=1.0)
    assert type(control) is Control
    before = plain.flat.data.get()
    set_gradient(plain, np.full(6, 2.0, np.float32))
    control.step(world.xp.asarray(np.float32(3.0)), plain.square(), 0.1)
    np.testing.assert_allclose(plain.flat.data.get(), before - 0.1 * 2.0 / math.sqrt(24), rtol=1e-5)
    assert control.read().norm == pytest.approx(math.sqrt(24))
