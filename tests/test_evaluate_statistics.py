"""Standard errors and comparisons: against closed forms, and against what they promise."""
import math

import numpy as np
import pytest

from tinyllm.evaluate import Metric, Scores, compare, figure
from tinyllm.evaluate.statistics import resampled

ACC = Metric("acc", "accuracy")
LOSS = Metric("nats", "nats per token", better="lower", percent=False)


def scores(values, weights=None, metric=ACC, best=None):
    values = np.asarray(values, dtype=float)
    return Scores(metric, values, np.ones(len(values)) if weights is None else np.asarray(weights, float), np.full(len(values), 0.25), best)


@pytest.mark.parametrize("n", [2, 30, 2000])
def test_error_of_a_mean_is_the_textbook_one(n):
    """√(Σ(x - mean)²/n²): what the bootstrap tends to. 1000 resamples know it to about 1/√2000 = 2.2 %."""
    values = np.random.default_rng(n).random(n) < 0.3
    values[0], values[-1] = True, False
    found = figure(scores(values))
    assert found.value == values.mean() and found.items == n and found.chance == 0.25 and found.best is None
    assert found.error == pytest.approx(values.std() / math.sqrt(n), rel=0.09)
    assert found.low <= found.value <= found.high


def test_error_of_a_ratio_is_that_of_the_delta_method():
    """Long texts weigh more: var(Σv/Σw) ≈ Σ(v - r·w)²/(Σw)²."""
    rng = np.random.default_rng(0)
    weights = rng.integers(5, 200, 500)
    values = weights * (3 + rng.normal(size=500))
    ratio = values.sum() / weights.sum()
    found = figure(scores(values, weights, LOSS, best=weights * 2.5))
    assert found.value == pytest.approx(ratio) and found.best == pytest.approx(2.5)
    assert found.error == pytest.approx(math.sqrt(((values - ratio * weights) ** 2).sum()) / weights.sum(), rel=0.09)


def test_a_perplexity_is_resampled_as_one():
    metric = Metric("perplexity", "perplexity", better="lower", percent=False, exponential=True)
    nats = np.random.default_rng(1).random(200) + 3
    plain, powers = figure(scores(nats, metric=LOSS)), figure(scores(nats, metric=metric))
    assert powers.value == pytest.approx(math.exp(plain.value)) and powers.low == pytest.approx(math.exp(plain.low), rel=1e-3)
    assert powers.error == pytest.approx(math.exp(plain.value) * plain.error, rel=0.05)
    assert figure(scores([1e4, 1e4], metric=metric)).value == math.inf


def test_intervals_cover_the_truth_as_often_as_they_say():
    """95 %, of 200 experiments with 60 items of a coin: 190 ± 3.1."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        found = figure(scores(rng.random(60) < 0.4), resamples=300)
        covered += found.low <= 0.4 <= found.high
    assert 177 <= covered <= 199


def test_few_items():
    one = figure(scores([1.0]))
    assert (one.value, one.error, one.low, one.items) == (1.0, None, None, 1)
    assert figure(scores([1.0, 1.0, 1.0])).error == 0
    with pytest.raises(ValueError, match="acc: there are no items"):
        figure(scores([]))


def test_the_same_numbers_again():
    values = np.random.default_rng(3).random(5000)
    a, b = figure(scores(values)), figure(scores(values))
    assert a == b and figure(scores(values), seed=1).error != a.error


def test_slices_of_resamples_are_one_stream(monkeypatch):
    """However many resamples are drawn at once."""
    from tinyllm.evaluate import statistics

    values = scores(np.random.default_rng(3).random(50))
    whole = resampled([values])
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 70)
    np.testing.assert_array_equal(whole, resampled([values]))


def test_a_paired_comparison_sees_what_the_errors_hide():
    """Two models whose scores move together: a difference of a tenth of the spread, on 300 items, is certain when paired."""
    rng = np.random.default_rng(4)
    hard = rng.normal(size=300)
    first, second = scores(hard, metric=LOSS), scores(hard + 0.1 + 0.1 * rng.normal(size=300), metric=LOSS)
    found = compare(first, second)
    assert found.difference == pytest.approx(0.1, abs=0.02) and found.p_value < 0.005 and found.low > 0
    assert found.error == pytest.approx((second.values - first.values).std() / math.sqrt(300), rel=0.09)
    assert found.error < figure(first).error / 5
    back = compare(second, first)
    assert back.difference == pytest.approx(-found.difference) and back.p_value == pytest.approx(found.p_value, abs=0.01)


def test_equal_models_are_not_told_apart():
    values = scores(np.random.default_rng(5).random(40) < 0.5)
    same = compare(values, values)
    assert (same.difference, same.error, same.p_value) == (0, 0, 1)
    rng, found = np.random.default_rng(6), 0
    for _ in range(200):
        a, b = rng.random((2, 80)) < 0.5
        found += compare(scores(a), scores(b)).p_value < 0.05
    assert found <= 22  # 5 % of 200, and three standard errors


def test_against_the_sign_test():
    """0 or 1 on each item: 14 items only the second has, 4 only the first. The exact sign test says p = 0.031."""
    first = np.array([0] * 14 + [1] * 4 + [1] * 50)
    second = np.array([1] * 14 + [0] * 4 + [1] * 50)
    exact = 2 * sum(math.comb(18, k) for k in range(14, 19)) / 2**18
    assert compare(scores(first), scores(second)).p_value == pytest.approx(exact, abs=0.025)


def test_p_values_of_equal_models_are_even():
    """Of 200 comparisons of models alike about half have p below 0.5: both sides count."""
    rng = np.random.default_rng(7)
    found = [compare(*(scores(rng.normal(size=60), metric=LOSS) for _ in range(2)), resamples=200).p_value for _ in range(200)]
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=0.12) and np.mean(found) == pytest.approx(0.5, abs=0.07)


def test_only_the_same_can_be_compared():
    with pytest.raises(ValueError, match="acc on 2 items and acc on 3: only the same metric on the same items"):
        compare(scores([1, 0]), scores([1, 0, 1]))
    with pytest.raises(ValueError, match="only the same metric"):
        compare(scores([1, 0]), scores([1, 0], metric=LOSS))
    assert compare(scores([1]), scores([0])).p_value is None
