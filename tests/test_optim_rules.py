"""Learning rates, clipping, loss scaling and outliers: pure rules around the update."""
import json
import math
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tinyllm.optim import SCHEDULES, LossScaler, OutlierDetector, clip_factor, global_norm, learning_rate

GOLDEN = np.load(Path(__file__).parent / "golden" / "optim.npz")
RUN = dict(steps=100, lr=1.0, min_lr=0.1, warmup=10)


def nanogpts_learning_rate(it, warmup_iters, lr_decay_iters, learning_rate, min_lr):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    coefficient = 0.5 * (1.0 + math.cos(math.pi * (it - warmup_iters) / (lr_decay_iters - warmup_iters)))
    return min_lr + coefficient * (learning_rate - min_lr)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (3, 20), (100, 2000)])
def test_cosine_is_nanogpts(warmup, steps):
    for step in range(2 * steps):
        expected = nanogpts_learning_rate(step, warmup, steps, 1e-3, 1e-4)
        assert learning_rate(step, steps=steps, lr=1e-3, min_lr=1e-4, warmup=warmup, schedule="cosine") == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {10: 1.0, 55: 0.55, 40: 0.1 + 0.9 * 0.75, 70: 0.1 + 0.9 * 0.25, 100: 0.1}),
        ("linear", {10: 1.0, 55: 0.55, 99: 0.11, 100: 0.1}),
        ("constant", {10: 1.0, 55: 1.0, 100: 1.0}),
        ("wsd", {10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 99: 0.145, 100: 0.1}),
    ],
)
def test_closed_values(schedule, expected):
    warmup = {0: 1 / 11, 4: 5 / 11, 9: 10 / 11}
    for step, value in (warmup | expected).items():
        assert learning_rate(step, **RUN, schedule=schedule) == pytest.approx(value, rel=1e-12), step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_rise_to_lr_then_never_rise_again(schedule):
    rates = [learning_rate(step, **RUN, schedule=schedule) for step in range(150)]
    assert all(a < b for a, b in pairwise(rates[:11])) and rates[10] == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:])) and min(rates[10:]) >= 0.1
    assert set(rates[100:]) == {1.0 if schedule == "constant" else 0.1}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_short_runs(schedule):
    after = 1.0 if schedule == "constant" else 0.1
    assert learning_rate(0, steps=1, lr=1.0, min_lr=0.1, warmup=0, schedule=schedule) == 1.0
    assert learning_rate(0, steps=0, lr=1.0, min_lr=0.1, warmup=0, schedule=schedule) == after
    assert learning_rate(7, steps=5, lr=1.0, min_lr=0.1, warmup=8, schedule=schedule) == 8 / 9  # all warm-up
    assert learning_rate(8, steps=5, lr=1.0, min_lr=0.1, warmup=8, schedule=schedule) == after
    assert learning_rate(96, steps=100, lr=1.0, min_lr=0.1, warmup=95, schedule="wsd") == pytest.approx(0.82)  # warm-up into the decay


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule 'cosin' is unknown: use one of cosine, linear, constant, wsd; did you mean cosine?"):
        learning_rate(0, **RUN, schedule="cosin")


def test_norm_of_one_array_and_of_many():
    x = np.random.default_rng(0).standard_normal(200_001)
    expected = math.sqrt(math.fsum(v * v for v in x.tolist()))
    assert global_norm(x) == pytest.approx(expected, rel=1e-14)
    assert global_norm(x[:1], x[1:70_000].reshape(-1, 1), x[70_000:]) == pytest.approx(expected, rel=1e-14)
    assert global_norm() == global_norm(np.zeros((0, 3), np.float32)) == global_norm(np.zeros(5)) == 0
    assert global_norm(np.array(-3.0)) == 3


def test_norm_survives_what_float32_squares_do_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert global_norm(np.full(100_000, 3e38, np.float32)) == pytest.approx(3e38 * math.sqrt(1e5), rel=1e-6)
        assert global_norm(np.full(4, 1e-40, np.float32)) == pytest.approx(2e-40, rel=1e-5)
        assert global_norm(np.array([1e10] + [1.0] * 10**6, np.float32)) == pytest.approx(math.sqrt(1e20 + 1e6), rel=1e-15)
        assert math.isnan(global_norm(np.array([1, np.nan, np.inf], np.float32)))
        assert global_norm(np.array([1, -np.inf], np.float32)) == math.inf


def test_clipping_is_pytorchs():
    gradient = GOLDEN["start.w"].ravel()
    norm = global_norm(gradient)
    assert norm == pytest.approx(float(GOLDEN["clip.norm"]), rel=1e-15)
    for maximum, expected in zip(GOLDEN["clip.maxima"], GOLDEN["clip.gradients"], strict=True):
        np.testing.assert_allclose(gradient * clip_factor(norm, maximum), expected, rtol=1e-15)


def test_clip_factor_at_the_edges():
    assert clip_factor(0.0, 1.0) == clip_factor(0.5, 1.0) == clip_factor(1e300, math.inf) == 1.0
    assert clip_factor(4.0, 1.0) * 4.0 == pytest.approx(1.0, rel=1e-6)
    assert clip_factor(1e300, 1.0) * 1e300 == pytest.approx(1.0)
    for norm in (math.nan, math.inf):
        with pytest.raises(ValueError, match="skip this update"):
            clip_factor(norm, 1.0)
    for maximum in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be above 0"):
            clip_factor(1.0, maximum)


def test_scales_are_those_of_pytorchs_scaler():
    scaler, scales = LossScaler(growth_interval=3), []
    for finite in GOLDEN["scaler.finite"]:
        scaler.update(finite)
        scales.append(scaler.scale)
    assert scales == GOLDEN["scaler.scales"].tolist()


def test_scaler_finds_the_largest_scale_that_fits():
    """Planted: the largest gradient is 3, so fp16 overflows above a scale of 65504/3, and 2**14 is the best power of two."""
    scaler, skipped = LossScaler(growth_interval=10), 0
    for _ in range(200):
        with np.errstate(over="ignore"):
            finite = bool(np.isfinite(np.float16(3.0 * scaler.scale)))
        skipped += not finite
        scaler.update(finite)
    assert scaler.scale in (2.0**14, 2.0**15) and 15 < skipped < 25  # once in ten steps it looks whether more fits


def test_scaler_goes_on_from_its_saved_state():
    scaler, resumed = LossScaler(growth_interval=5), LossScaler(growth_interval=5)
    for finite in (True, False, True, True, True):
        scaler.update(finite)
    resumed.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert (resumed.scale, resumed.good_steps) == (2.0**15, 3)
    for _ in range(2):
        scaler.update(True)
        resumed.update(True)
    assert resumed.scale == scaler.scale == 2.0**16


def test_scaler_says_when_no_scale_helps():
    scaler = LossScaler.for_precision("fp16")
    for _ in range(16):
        scaler.update(False)
    assert scaler.scale == 1.0
    with pytest.raises(FloatingPointError, match="cannot fall below 1: the model itself diverges"):
        scaler.update(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wide_exponents_need_no_scale(precision):
    scaler = LossScaler.for_precision(precision)
    for _ in range(5000):
        scaler.update(True)
    assert scaler.scale == 1.0
    with pytest.raises(FloatingPointError, match="diverges"):
        scaler.update(False)


def test_scaler_settings():
    with pytest.raises(ValueError, match="'fp8' is unknown: use one of fp32, bf16, fp16"):
        LossScaler.for_precision("fp8")
    for settings in (dict(initial=0.5), dict(minimum=0.0), dict(growth_interval=0), dict(initial=math.nan)):
        with pytest.raises(ValueError, match="LossScaler takes"):
            LossScaler(**settings)


def test_planted_outliers_are_found_and_nothing_else():
    losses = np.random.default_rng(0).normal(3.0, 0.1, 1000)
    planted = {300: 5.0, 600: math.nan, 700: math.inf, 900: 4.0}
    losses[list(planted)] = list(planted.values())
    detector = OutlierDetector(window=64, z=6.0)
    scores = {step: detector.update(loss) for step, loss in enumerate(losses)}
    assert {step for step, z in scores.items() if z is not None} == set(planted)
    assert scores[600] == scores[700] == math.inf
    window = losses[300 - 64 : 300]
    assert scores[300] == pytest.approx((5.0 - window.mean()) / window.std(), rel=1e-12)


def test_outliers_are_judged_by_a_full_window_and_only_upwards():
    detector = OutlierDetector(window=4, z=2.0)
    assert [detector.update(x) for x in (1.0, 1e30, 2.0, 3.0)] == [None] * 4
    detector = OutlierDetector(window=4, z=2.0)
    assert [detector.update(x) for x in (1.0, 2.0, 1.0, 2.0, -1e30)] == [None] * 5
    assert OutlierDetector().update(math.nan) == math.inf


def test_a_new_level_becomes_normal():
    detector = OutlierDetector(window=8, z=3.0)
    scores = [detector.update(x) for x in [1.0, 2.0] * 8 + [10.0, 11.0] * 8]
    assert scores[16] is not None and scores[-1] is None and sum(z is not None for z in scores) < 4


def test_a_window_without_spread_and_huge_values():
    detector = OutlierDetector(window=3, z=3.0)
    assert [detector.update(x) for x in (2.0, 2.0, 2.0, 2.0, 1.0)] == [None] * 5
    detector = OutlierDetector(window=3, z=3.0)
    assert [detector.update(x) for x in (2.0, 2.0, 2.0, 2.5)] == [None, None, None, math.inf]
    detector = OutlierDetector(window=3, z=3.0)
    assert [detector.update(x) for x in (1e308, 1.1e308, 1e308, 1.05e308)] == [None] * 4


def test_detector_goes_on_from_its_saved_state():
    values = np.random.default_rng(0).normal(size=100).tolist()
    detector, resumed = OutlierDetector(window=10, z=1.0), OutlierDetector(window=10, z=1.0)
    for value in values[:50]:
        detector.update(value)
    resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    scores = [detector.update(value) for value in values[50:]]
    assert scores == [resumed.update(value) for value in values[50:]] and any(scores)


def test_detector_settings():
    for settings in (dict(window=1), dict(z=0.0), dict(z=math.nan)):
        with pytest.raises(ValueError, match="OutlierDetector takes window ≥ 2 and z > 0"):
            OutlierDetector(**settings)
