"""Every case of every op against PyTorch (recorded by golden/make_ops.py; live where torch is installed), and against closed forms."""
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.ops import RopeScaling, alibi_slopes, rope, rope_frequencies, rope_table, sinusoidal_positions
from tinyllm.ops.cases import CASES
from tinyllm.tensor import OPS, Tensor

GOLDEN = np.load(Path(__file__).parent / "golden" / "ops.npz")
SHAPES = json.loads(str(GOLDEN["cases"]))


def name_of(case):
    return f"{case.op}: {case.label}"


def recorded():
    """Name of each case -> [y, gradient of each argument …] as PyTorch computed them."""
    found, values = {}, GOLDEN["values"]
    for name, shapes in SHAPES.items():
        found[name] = []
        for shape in shapes:
            found[name].append(values[: math.prod(shape)].reshape(shape))
            values = values[math.prod(shape) :]
    assert not values.size
    return found


RECORDED = recorded()


def ours(case):
    """[y, gradient of each argument …], by tinyllm."""
    arguments = [Tensor(x, x.dtype.kind == "f") if isinstance(x, np.ndarray) else x for x in case.arrays()]
    y = case.function(*arguments)
    y.backward(case.upstream(y.shape))
    return [y.data, *(x.grad for x in arguments if isinstance(x, Tensor) and x.requires_grad)]


def assert_close(found, expected, tolerance=1e-10):
    assert [a.shape for a in found] == [a.shape for a in expected]
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=1e-3)


def test_every_op_and_case_has_a_recorded_oracle():
    assert set(SHAPES) == {name_of(case) for case in CASES}, "run tests/golden/make_ops.py again"
    assert {name.partition(":")[0] for name in SHAPES} == set(OPS)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_values_and_gradients_are_pytorchs(case):
    assert_close(ours(case), RECORDED[name_of(case)])


@pytest.mark.peers
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_values_and_gradients_are_pytorchs_live(case):
    pytest.importorskip("torch")
    from torch_twins import values_and_gradients

    assert_close(ours(case), values_and_gradients(case))
    assert_close(values_and_gradients(case), RECORDED[name_of(case)], 1e-12)


@pytest.mark.peers
def test_every_op_has_a_twin():
    pytest.importorskip("torch")
    from torch_twins import TWINS

    assert set(TWINS) == set(OPS)


@pytest.mark.peers
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_cast_is_pytorchs_live(precision):
    """Value and gradient on the 16-bit grid: the case of the table, fp32, is the one that finite differences can check."""
    torch = pytest.importorskip("torch")
    from torch_twins import TWINS

    x = np.random.default_rng(0).standard_normal(1000, dtype=np.float32) * 1000
    dy = np.random.default_rng(1).standard_normal(1000, dtype=np.float32)
    a, b = Tensor(x, True), torch.tensor(x, requires_grad=True)
    y, twin = ops.cast(a, precision=precision), TWINS["cast"](b, precision=precision)
    y.backward(dy)
    twin.backward(torch.tensor(dy))
    assert np.array_equal(y.data, twin.detach().numpy())
    assert np.array_equal(a.grad, b.grad.numpy())


# What PyTorch has no function for, or a wider range than the table's.


def test_erf_is_the_standard_librarys_everywhere():
    x = np.concatenate([np.linspace(-8, 8, 4001), [-1.0, 1.0, 0.0, 6.0, 1e-300, 1e30, -np.inf, np.inf]])
    expected = np.array([math.erf(v) for v in x])
    assert np.abs(ops.erf(Tensor(x)).data - expected).max() < 4e-16
    assert np.isnan(ops.erf(Tensor(np.array([np.nan]))).data).all()


ROPE = {
    "plain": None,
    "linear": RopeScaling("linear", 4.0),
    "ntk": RopeScaling("ntk", 4.0),
    "llama3": RopeScaling("llama3", 8.0, original_context=1024),
    "yarn": RopeScaling("yarn", 16.0, original_context=4096),
    "yarn_bounds": RopeScaling("yarn", 4.0, original_context=300, low_frequency=2.0, high_frequency=20.0),
}


def test_rope_scalings_are_transformers():
    assert {f"rope_{name}" for name in ROPE} == {name for name in GOLDEN if name.startswith("rope_")}
    for name, scaling in ROPE.items():
        frequencies, sharpness = rope_frequencies(32, 500000.0, scaling)
        np.testing.assert_allclose([*frequencies, sharpness], GOLDEN[f"rope_{name}"], rtol=2e-6)  # theirs are float32


@pytest.mark.peers
@pytest.mark.parametrize("name", ROPE)
def test_rope_scalings_are_transformers_live(name):
    pytest.importorskip("transformers")
    from golden.make_ops import rope_frequencies as theirs

    frequencies, sharpness = rope_frequencies(32, 500000.0, ROPE[name])
    np.testing.assert_allclose([*frequencies, sharpness], theirs(name), rtol=2e-6)


def test_rope_scalings_keep_their_promises():
    plain, _ = rope_frequencies(64)
    assert np.allclose(rope_frequencies(64, scaling=RopeScaling("linear", 4.0))[0], plain / 4)
    for kind in ("ntk", "llama3", "yarn"):
        scaled, _ = rope_frequencies(64, scaling=RopeScaling(kind, 4.0, original_context=512))
        assert np.isclose(scaled[0], plain[0]) and np.isclose(scaled[-1], plain[-1] / 4)  # fastest kept, slowest interpolated
        assert (np.diff(scaled) < 0).all()
    for kind in ("linear", "ntk", "llama3", "yarn"):  # no stretch is no change
        frequencies, sharpness = rope_frequencies(64, scaling=RopeScaling(kind, 1.0, original_context=512))
        assert np.allclose(frequencies, plain) and sharpness == 1
    assert rope_frequencies(2, scaling=RopeScaling("ntk", 4.0))[0].tolist() == [1.0]


def test_rope_refuses_odd_widths_and_unknown_scalings():
    with pytest.raises(ValueError, match="must be even, got 5"):
        rope_frequencies(5)
    with pytest.raises(ValueError, match="'dynamic' is unknown: use linear, ntk, llama3 or yarn"):
        rope_frequencies(4, scaling=RopeScaling("dynamic", 2.0))
    with pytest.raises(ValueError, match="8 components are 4 pairs, but cos and sin have 1 angles"):
        rope(np.ones((2, 8)), np.ones((2, 1)), np.zeros((2, 1)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [None, RopeScaling("yarn", 4.0, original_context=32)], ids=["plain", "yarn"])
def test_rope_makes_products_depend_on_the_distance_alone(interleaved, scaling):
    random = np.random.default_rng(0)
    frequencies, sharpness = rope_frequencies(8, 100.0, scaling)
    cos, sin = (Tensor(t) for t in rope_table(np.arange(40), frequencies, sharpness))
    q, k = (np.tile(random.standard_normal(8), (40, 1)) for _ in range(2))  # one query and one key at every position
    q, k = (rope(Tensor(x), cos, sin, interleaved=interleaved).data for x in (q, k))
    products = q @ k.T  # (query position, key position)
    for distance in range(-39, 40):
        diagonal = np.diagonal(products, distance)
        assert np.ptp(diagonal) < 1e-12
    assert np.ptp(products[0]) > 0.1  # but on the distance they do depend
    assert np.allclose((q * q).sum(-1), (q * q).sum(-1)[0])  # a rotation keeps lengths


def test_rope_layouts_differ_by_a_permutation():
    """Interleaved pairs, put side by side, are the half-split layout."""
    x = np.random.default_rng(0).standard_normal((5, 8))
    cos, sin = (Tensor(t) for t in rope_table(np.arange(5), rope_frequencies(8)[0]))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    interleaved = rope(Tensor(x), cos, sin, interleaved=True).data
    assert np.array_equal(interleaved[:, order], rope(Tensor(x[:, order].copy()), cos, sin).data)


def test_rope_positions_may_differ_by_row():
    """cos and sin with leading axes: a batch whose rows stand at different positions."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6))
    positions = np.array([[0, 1, 2, 3], [5, 6, 7, 8]])
    cos, sin = rope_table(positions, rope_frequencies(6)[0])
    together = rope(Tensor(x), Tensor(cos[:, None]), Tensor(sin[:, None])).data
    for b in range(2):
        assert np.array_equal(together[b], rope(Tensor(x[b]), Tensor(cos[b]), Tensor(sin[b])).data)


def published_alibi_slopes(heads):
    """As the paper states it: a geometric series that starts at its own ratio, 2^(-8/n); in between, every other one of twice as many."""
    if heads & (heads - 1) == 0:
        ratio = 2 ** (-8 / heads)
        return [ratio ** (i + 1) for i in range(heads)]
    power = 1 << (heads.bit_length() - 1)
    return published_alibi_slopes(power) + published_alibi_slopes(2 * power)[0::2][: heads - power]


def test_alibi_slopes_are_the_published_ones():
    for heads in range(1, 70):
        np.testing.assert_allclose(alibi_slopes(heads), published_alibi_slopes(heads), rtol=1e-12)
    assert alibi_slopes(8).tolist() == [0.5**n for n in range(1, 9)]


@pytest.mark.parametrize("width", [1, 6, 7])
def test_sinusoidal_positions_by_the_formula(width):
    table = sinusoidal_positions(20, width)
    for t in range(20):
        for c in range(width):
            angle = t / 10000 ** (2 * (c // 2) / width)
            assert math.isclose(table[t, c], math.cos(angle) if c % 2 else math.sin(angle), abs_tol=1e-12)
    assert sinusoidal_positions(0, 4).shape == (0, 4)


def test_dropout_keeps_the_mean_and_the_rate():
    x = Tensor(np.ones((500, 400)), True)
    y = ops.dropout(x, rate=0.3, rng=np.random.default_rng(0))
    assert abs((y.data == 0).mean() - 0.3) < 0.005 and abs(y.data.mean() - 1) < 0.01
    y.sum().backward()
    assert np.array_equal(x.grad, y.data)
    assert np.array_equal(ops.dropout(x, rate=0.0, rng=np.random.default_rng(0)).data, x.data)
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="dropout rate"):
            ops.dropout(x, rate=rate, rng=np.random.default_rng(0))
