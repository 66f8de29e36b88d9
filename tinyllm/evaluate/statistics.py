"""How far can a figure be trusted? The bootstrap: measure again on items drawn, with replacement, from those that there are.

Every figure here is a ratio of sums over items, Σ valuesᵢ / Σ weightsᵢ: accuracy with weights of 1, bits per byte with bits and bytes.
One item's share is what is drawn, so texts of different lengths need no formula of their own.

    standard error = standard deviation of the figure over resamples          (for a plain mean it tends to √(var/n))

Two models that answered the same items are compared on the same resamples: what makes an item hard for both then cancels, and a
difference far smaller than either's own error can be seen.
Source: Efron & Tibshirani 1993, chapters 6 and 16; Koehn 2004 (paired, for language).
"""
import math
from dataclasses import dataclass, field

import numpy as np

from tinyllm.backend import random_stream

RESAMPLES = 1000
DRAWS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Metric:
    """What a figure is called, and how it is read.

    better : "higher" or "lower".     percent : shown as such.     exponential : the figure is e^(Σ values / Σ weights), as a perplexity.
    """

    name: str
    title: str
    better: str = "higher"
    percent: bool = True
    exponential: bool = False


@dataclass(frozen=True)
class Scores:
    """One metric on each of n items.     all (n,) float64

    values, weights : the figure is Σ values / Σ weights.     chance : the values that are expected of who knows nothing.
    best : the values of who knows everything that can be known, where that is known; None elsewhere.
    """

    metric: Metric
    values: np.ndarray
    weights: np.ndarray
    chance: np.ndarray
    best: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def only(self, chosen: np.ndarray) -> "Scores":
        """The items that are chosen, by numbers or a mask."""
        best = None if self.best is None else self.best[chosen]
        return Scores(self.metric, self.values[chosen], self.weights[chosen], self.chance[chosen], best)


@dataclass(frozen=True)
class Figure:
    """A metric over all items.

    error : standard error, None for fewer than 2 items, or infinite ones.     low, high : the middle 95 % of resamples, or None.     items : how many.
    chance, best : what the same metric is for who knows nothing, and for who knows all that can be known (None if that is unknown).
    """

    metric: Metric = field(repr=False)
    value: float
    error: float | None
    low: float | None
    high: float | None
    chance: float
    best: float | None
    items: int


@dataclass(frozen=True)
class Comparison:
    """Second figure minus first, on the same items.

    error, low, high : as in Figure.     p_value : how often, if there were no difference, one of this size would be seen, either way.
    """

    metric: Metric = field(repr=False)
    first: float
    second: float
    difference: float
    error: float | None
    low: float | None
    high: float | None
    p_value: float | None
    items: int


def figure(scores: Scores, seed: int = 0, resamples: int = RESAMPLES) -> Figure:
    """The metric with its standard error. ValueError for no items."""
    drawn = resampled([scores], seed, resamples)[0] if len(scores) > 1 else None
    best = None if scores.best is None else _ratio(scores, scores.best)
    return Figure(scores.metric, _ratio(scores, scores.values), *_spread(drawn), _ratio(scores, scores.chance), best, len(scores))


def compare(first: Scores, second: Scores, seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Paired bootstrap of two models' scores on the same items. ValueError where these are not as many, or another metric's."""
    if len(first) != len(second) or first.metric != second.metric:
        raise ValueError(
            f"{first.metric.name} on {len(first)} items and {second.metric.name} on {len(second)}: only the same metric on the same items can be compared")
    a, b = _ratio(first, first.values), _ratio(second, second.values)
    if len(first) < 2:
        return Comparison(first.metric, a, b, b - a, None, None, None, None, len(first))
    drawn = np.subtract(*resampled([second, first], seed, resamples))
    below, above = np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)
    p_value = min(1.0, 2 * (min(below, above) + 1) / (resamples + 1))  # + 1: never 0, which no number of resamples could show
    return Comparison(first.metric, a, b, b - a, *_spread(drawn), p_value, len(first))


def resampled(several: list[Scores], seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Each metric on the same random choices of items, n out of n with replacement.     -> (len(several), resamples)"""
    n, rng = len(several[0]), random_stream(seed, "bootstrap")
    figures = np.empty((len(several), resamples))
    step = max(1, DRAWS_AT_ONCE // n)
    for first in range(0, resamples, step):
        part = slice(first, min(first + step, resamples))
        chosen = rng.integers(n, size=(part.stop - first, n))
        for row, s in zip(figures, several, strict=True):
            row[part] = s.values[chosen].sum(1) / s.weights[chosen].sum(1)
    for row, s in zip(figures, several, strict=True):
        if s.metric.exponential:
            with np.errstate(over="ignore"):  # infinite, then: `_spread` knows
                np.exp(row, out=row)
    return figures


def _ratio(scores: Scores, values: np.ndarray) -> float:
    if not len(scores):
        raise ValueError(f"{scores.metric.name}: there are no items to measure it on")
    ratio = float(values.sum() / scores.weights.sum())
    if scores.metric.exponential:
        return math.exp(ratio) if ratio < 700 else math.inf
    return ratio


def _spread(drawn) -> tuple[float | None, float | None, float | None]:
    if drawn is None or not np.isfinite(drawn).all():
        return None, None, None
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(drawn.std(ddof=1)), float(low), float(high)
