"""Every op on a device, with the kernels that it has there, in fp32 and in real 16-bit arrays, against the definition in float64 on the CPU.

On the fake device, and with `-m gpu` on a real one. Twice: with all kernels, and with kernels/cuda/storage.py alone.
"""
import functools
import operator
from contextlib import contextmanager

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.anomaly import detect_anomaly
from tinyllm.backend import to_numpy
from tinyllm.kernels import KERNELS, MODULES, plain_ops
from tinyllm.kernels.cuda import storage
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.nn.transformer import Block
from tinyllm.ops.cases import CASES
from tinyllm.optim import AdamW, Optimizer
from tinyllm.tensor import OPS, Into, Tensor

TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}  # of values, relative to the largest; of gradients twice as much


@contextmanager
def storage_alone():
    """Inside this block ops have the twin of storage.py and no other."""
    runs = {op: op.run for op in OPS.values()}

    def choose(op):
        twin = storage.cast if op is ops.cast else storage.widened(op)

        def run(*arrays, **settings):
            result = twin(*arrays, **settings)
            return op.array(*arrays, **settings) if result is NotImplemented else result

        return run

    try:
        for op in runs:
            op.run = choose(op)
        yield
    finally:
        for op, run in runs.items():
            op.run = run


@pytest.fixture(params=["all kernels", "storage alone"])
def kernels(request, world):
    if request.param == "all kernels":
        yield
        return
    with storage_alone():
        yield


def rounded(x, precision):
    """A floating-point argument of a case as a precision has it, in float64."""
    return x.astype(storage.dtype_of(precision)).astype(np.float64)


def argument(x, place):
    """A Tensor that is differentiated, a constant Tensor, or what else the case has; floating-point values through place()."""
    data = x.data if isinstance(x, Tensor) else x
    if not isinstance(data, np.ndarray) or data.dtype.kind != "f":
        return x
    return Tensor(place(data), requires_grad=not isinstance(x, Tensor))


def off_by(ours, theirs):
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    found = to_numpy(ours).astype(np.float64)
    same = (found == theirs) | (np.isnan(found) & np.isnan(theirs))
    return np.abs(np.where(same, 0, found - theirs)).max(initial=0) / max(1.0, np.abs(theirs[np.isfinite(theirs)]).max(initial=0))


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.label}")
def test_every_op_in_every_precision(world, kernels, case, precision):
    arrays, dtype = case.arrays(), storage.dtype_of(precision)
    here = [argument(x, lambda a: rounded(a, precision)) for x in arrays]
    there = [argument(x, lambda a: world.xp.asarray(a.astype(dtype))) for x in arrays]
    with plain_ops():
        expected = case.function(*here)
        dy = rounded(case.upstream(expected.shape), precision)
        expected.backward(dy)
    with world.forbidden():
        found = case.function(*there)
        found.backward(world.xp.asarray(dy.astype(found.dtype)))
    stays = case.op == "cast" or OPS[case.op].__module__.rpartition(".")[2] in storage.STAY_FP32  # the one case of cast is to fp32
    assert found.dtype == (np.float32 if stays else dtype)
    assert off_by(found.data, expected.data) < TOLERANCE[precision]
    for a, b in zip(here, there, strict=True):
        if isinstance(a, Tensor) and a.grad is not None:
            assert b.grad.dtype == b.dtype == dtype
            assert off_by(b.grad, a.grad) < 2 * TOLERANCE[precision]


KERNELS_OF_OPS = {
    "attention": "attention tiled_attention", "linear": "linear matmul", "norms": "layernorm rmsnorm", "rope": "rope",
    "activations": "gelu gelu_tanh silu relu relu2 swiglu geglu", "embedding": "embedding", "cross_entropy": "cross_entropy linear_cross_entropy",
}  # fmt: skip
KERNELS_OF_MODULES = {
    "block": (Block, "forward"), "decode": (Transformer, "next_scores"), "adamw": (AdamW, "control"), "adamw's norm": (Optimizer, "square"),
}  # fmt: skip


def test_every_kernel_has_its_tests(world):
    """In test_cuda_linear.py, test_cuda_attention.py, …_rows, …_loss, …_block, …_decode and …_optim."""
    own = {name for name, kernel in KERNELS["cuda"].items() if kernel.__module__ != storage.__name__}
    assert own == set(" ".join(KERNELS_OF_OPS.values()).split()) and MODULES["cuda"] == set(KERNELS_OF_MODULES.values())


@pytest.fixture
def x(world):
    return world.xp.asarray(np.random.default_rng(0).standard_normal((4, 6)).astype(np.float16))


def test_what_moves_numbers_stays_a_view(kernels, x):
    t = Tensor(x, requires_grad=True)
    for view in (t.reshape(2, 12), t.T, t.swapaxes(0, 1), t[1:, None], ops.expand(t[:1], shape=(3, 1, 6)), ops.split(t, 2)[1]):
        assert view.dtype == np.float16 and view.data.base is x
    y = t[np.array([0, 0, 3])]
    y.backward(y.data)
    assert off_by(t.grad, to_numpy(x).astype(float) * np.array([2.0, 0, 0, 1])[:, None]) < 1e-3


def test_one_operation_needs_no_fp32_copy(kernels, x):
    """a + b of fp16 arrays is the fp32 sum, rounded once, either way."""
    a, b = to_numpy(x).astype(np.float32), to_numpy(x)[::-1].astype(np.float32)
    for name in ("add", "sub", "mul"):
        found = OPS[name](Tensor(x), Tensor(x[::-1]))
        assert np.array_equal(to_numpy(found.data), OPS[name].array(a, b)[0].astype(np.float16))


def test_numbers_and_fp32_arrays_do_not_widen_what_is_stored(kernels, world, x):
    t = Tensor(x)
    for y in (t * 2.0, 1 / t, t + world.xp.ones(6, dtype=np.float32), t**2, ops.masked_fill(t, np.ones(6, bool), value=0.0), t * np.float64(3)):
        assert y.dtype == np.float16
    assert t.sum().dtype == ops.softmax(t).dtype == t.mean(-1).dtype == np.float32


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cast_converts_and_its_gradient_comes_back(kernels, world, precision):
    values, dtype = np.array([1 / 3, 1e-3, 3e5], np.float32), storage.dtype_of(precision)
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)  # 3e5 is infinite in fp16
    t = Tensor(world.xp.asarray(values), requires_grad=True)
    y = ops.cast(t, precision=precision)
    assert y.dtype == dtype and np.array_equal(to_numpy(y.data), stored)
    assert ops.cast(y, precision=precision).data is y.data  # what is stored already is not copied
    assert ops.cast(y, precision="fp32").dtype == np.float32
    y.backward(world.xp.asarray(values))
    assert t.grad.dtype == np.float32 and np.array_equal(to_numpy(t.grad), stored.astype(np.float32))
    with pytest.raises(ValueError, match="'fp8' is unknown"):
        ops.cast(t, precision="fp8")


def test_16_bit_values_can_be_leaves_with_gradients(world):
    leaf = Tensor(world.xp.asarray(np.ones(3, storage.dtype_of("bf16"))), requires_grad=True)
    (leaf * leaf).sum().backward()
    (leaf * 2.0).backward(np.ones(3))
    assert leaf.grad.dtype == leaf.dtype and to_numpy(leaf.grad).tolist() == [4, 4, 4]
    assert "bfloat16" in repr(leaf)
    with pytest.raises(ValueError, match="only floating-point"):
        Tensor(world.xp.ones(3, dtype=np.int16), requires_grad=True)


def test_gradients_that_write_where_they_belong(world, monkeypatch):
    """An Into, and a generator, of an op that was widened."""

    def writing(x, w, *, generator=False):
        def backward(dy):
            parts = (0, dy * w), (1, Into(lambda out: operator.setitem(out, slice(None), (dy * x).sum(0))))
            return iter(parts) if generator else tuple(part for _, part in parts)

        return x * w, backward

    writing.array, writing.__module__ = writing, "tinyllm.ops.elementwise"
    twin = storage.widened(writing)
    x, w = np.arange(6.0).reshape(2, 3), np.array([1.0, 2.0, 4.0])
    for generator in (False, True):
        monkeypatch.setattr(ops.mul, "run", functools.partial(twin, generator=generator))
        a = Tensor(world.xp.asarray(x.astype(np.float16)), requires_grad=True)
        b = Tensor(world.xp.asarray(w.astype(np.float32)), requires_grad=True)
        y = a * b
        y.backward(np.ones((2, 3)))
        assert y.dtype == a.grad.dtype == np.float16 and b.grad.dtype == np.float32
        assert to_numpy(a.grad).tolist() == [[1, 2, 4]] * 2 and to_numpy(b.grad).tolist() == [3, 5, 7]


def test_anomalies_are_seen_in_16_bits(world):
    x = Tensor(world.xp.asarray(np.array([1, 60000], np.float16)))
    with detect_anomaly(), pytest.raises(FloatingPointError, match=r"'mul' made NaN or infinity: result float16\[2\]"):
        x * 2.0
    x = Tensor(world.xp.asarray(np.array([1, 0], storage.dtype_of("bf16"))))
    with detect_anomaly(), pytest.raises(FloatingPointError, match=r"'log' made NaN or infinity: result bfloat16\[2\]"):
        ops.log(x)


def test_bf16_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(storage.FORMATS, "bf16", "a format that nobody registered")
    with pytest.raises(ValueError, match="needs ml_dtypes.*pip install"):
        storage.dtype_of("bf16")


# ---- whole models ----

V = 29
TINY = dict(vocab_size=V, layers=2, heads=2, width=64, mlp_width=48, context=40)
IDS, TARGETS = np.random.RandomState(0).randint(0, V, (2, 2, 33))
CHOICES = [
    dict(arch="gpt2"), dict(arch="llama", kv_heads=1, tie=False), dict(arch="llama", qk_norm=True, norm_placement="post", positions="sinusoidal"),
    dict(positions="alibi", mlp="relu2", bias=True, softcap=4.0, recompute=True, dropout=0.2), dict(arch="gpt2", window=8, mlp="geglu"),
]  # fmt: skip


def model_of(xp, **changes):
    model = Transformer(TransformerConfig(**(TINY | changes)), np.random.default_rng(0))
    rng = np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data = xp.asarray(p.data + (0.1 * rng.standard_normal(p.shape)).astype(np.float32))
    return model


def loss_of(model):
    rng = np.random.default_rng(2) if model.config.dropout else None
    return ops.linear_cross_entropy(model.hidden(IDS, rng=rng), model.output_weight, TARGETS)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("fp16", 0.005), ("bf16", 0.04)])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_a_step_of_a_model_is_near_the_cpus_and_does_not_wait(world, kernels, choices, precision, tolerance):
    exact, model = model_of(np, **choices), model_of(world.xp, **choices, precision=precision)
    with plain_ops():
        expected = loss_of(exact)
        expected.backward()
    with world.forbidden():
        found = loss_of(model)
        found.backward(128.0)
        hidden = model.hidden(IDS)
    assert found.dtype == np.float32 and found.item() == pytest.approx(expected.item(), rel=tolerance)
    assert hidden.dtype == storage.dtype_of(precision)
    ours = np.concatenate([to_numpy(p.grad).reshape(-1) for _, p in model.named_parameters()]) / 128
    theirs = np.concatenate([p.grad.reshape(-1) for _, p in exact.named_parameters()])
    assert ours.dtype == np.float32 and np.linalg.norm(ours - theirs) < 4 * tolerance * np.linalg.norm(theirs)
