"""Each sampler against the distribution that its definition gives, worked out here in plain Python for every set of tokens."""
import itertools
import math

import fake_cupy
import numpy as np
import pytest

from tinyllm.generate.samplers import (
    FILTERS,
    SAMPLERS,
    adjust,
    choose,
    draw,
    frequency_penalty,
    greedy,
    log_probabilities,
    log_probability,
    min_p,
    presence_penalty,
    probabilities,
    ranked,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
    typical,
)
from tinyllm.generate.settings import SamplingConfig

INF = math.inf


def shares(weights):
    return [w / math.fsum(weights) for w in weights]


def smallest_set(p, order, mass):
    """Of all sets that hold the mass, one of the fewest tokens; of those, the one that comes first in the order."""
    rank = {token: place for place, token in enumerate(order)}
    for size in range(1, len(p) + 1):
        fits = [s for s in itertools.combinations(order, size) if math.fsum(p[i] for i in s) >= mass]
        if fits:
            return min(fits, key=lambda s: sorted(rank[i] for i in s))


def only(p, kept):
    return shares([q if i in kept else 0.0 for i, q in enumerate(p)])


def by_likelihood(p):
    return sorted(range(len(p)), key=lambda i: (-p[i], i))


def exact_typical(p, mass):
    entropy = -math.fsum(q * math.log(q) for q in p if q)
    order = sorted(range(len(p)), key=lambda i: (abs(-math.log(p[i]) - entropy) if p[i] else INF, i))
    kept, held = [], 0.0
    while held < mass:
        kept.append(order[len(kept)])
        held += p[kept[-1]]
    return only(p, kept)


def exact_repetition(x, theta, counts):
    return shares([math.exp(v if not c else v / theta if v > 0 else v * theta) for v, c in zip(x, counts, strict=True)])


# name -> (values to try, the exact distribution from (logits x, their probabilities p, value, counts))
EXACT = {
    "repetition_penalty": ([1, 1.2, 3], lambda x, p, value, c: exact_repetition(x, value, c)),
    "presence_penalty": ([0, 0.7, -1], lambda x, p, value, c: shares([q * math.exp(-value * (n > 0)) for q, n in zip(p, c, strict=True)])),
    "frequency_penalty": ([0, 0.7, -1], lambda x, p, value, c: shares([q * math.exp(-value * n) for q, n in zip(p, c, strict=True)])),
    "temperature": ([0, 0.3, 1, 2.5], lambda x, p, value, c: shares([q ** (1 / value) for q in p]) if value else only(p, by_likelihood(p)[:1])),
    "top_k": ([0, 1, 2, 5, 6, 99], lambda x, p, value, c: only(p, by_likelihood(p)[: value or None])),
    "top_p": ([0, 0.2, 0.5, 0.9, 0.999, 1], lambda x, p, value, c: only(p, smallest_set(p, by_likelihood(p), value)) if value < 1 else p),
    "min_p": ([0, 0.05, 0.5, 1], lambda x, p, value, c: only(p, [i for i, q in enumerate(p) if q >= value * max(p)])),
    "typical": ([0.01, 0.2, 0.5, 0.9], lambda x, p, value, c: exact_typical(p, value)),
}


def run(name, logits, value, counts):
    return SAMPLERS[name](logits, value) if name in FILTERS else SAMPLERS[name](logits, value, counts)


def test_every_sampler_has_a_case_and_a_setting():
    assert set(EXACT) == set(SAMPLERS)
    assert set(SAMPLERS) <= set(SamplingConfig.__dataclass_fields__)


@pytest.mark.parametrize("name, value", [(name, value) for name, (values, _) in EXACT.items() for value in values])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_distribution(name, value, dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5, 6)).astype(dtype)
    counts = rng.integers(0, 3, (5, 6))
    before = logits.copy()
    result = probabilities(run(name, logits, value, counts))
    for row, x, c in zip(result, logits.tolist(), counts.tolist(), strict=True):
        p = shares([math.exp(v) for v in x])
        np.testing.assert_allclose(row, EXACT[name][1](x, p, value, c), rtol=1e-12 if dtype == "float64" else 1e-5, atol=0)
    assert np.array_equal(logits, before)  # pure


def test_by_hand():
    logits = np.log([[0.5, 0.25, 0.125, 0.125]])
    counts = np.array([[2, 0, 1, 0]])
    np.testing.assert_allclose(probabilities(temperature(logits, 0.5)), np.array([[16, 4, 1, 1]]) / 22)
    np.testing.assert_allclose(probabilities(top_k(logits, 3)), np.array([[4, 2, 1, 0]]) / 7)  # of the two equal ones the lower id
    np.testing.assert_allclose(probabilities(top_p(logits, 0.7)), np.array([[2, 1, 0, 0]]) / 3)
    np.testing.assert_allclose(probabilities(min_p(logits, 0.3)), np.array([[2, 1, 0, 0]]) / 3)
    # entropy 1.75 bits; surprises 1, 2, 3, 3 bits: token 1 is nearest, then token 0
    np.testing.assert_allclose(probabilities(typical(logits, 0.25)), [[0, 1, 0, 0]])
    np.testing.assert_allclose(probabilities(typical(logits, 0.3)), np.array([[2, 1, 0, 0]]) / 3)
    np.testing.assert_allclose(presence_penalty(logits, 1.5, counts), logits - [[1.5, 0, 1.5, 0]])
    np.testing.assert_allclose(frequency_penalty(logits, 1.5, counts), logits - [[3, 0, 1.5, 0]])
    np.testing.assert_allclose(repetition_penalty(np.array([[3.0, 3, -3, -3]]), 2, counts), [[1.5, 3, -6, -3]])


@pytest.mark.parametrize("name, value", [(name, value) for name, (values, _) in EXACT.items() for value in values])
@pytest.mark.parametrize("logits", [
    [[0.3]],                                 # V = 1
    [[-INF, -INF, 2.0, -INF]],               # one token left
    [[1e30, 1e30 * 0.999, -1e30, 0.0]],
    [[-1e4, -1e4 - 1, -1e4 - 2, -INF]],
    [[0.0, 0.0, 0.0, 0.0]],
], ids=["one", "left", "huge", "low", "equal"])
def test_edges_keep_at_least_one_and_make_no_nan(name, value, logits):
    logits = np.array(logits)
    with np.errstate(invalid="raise", divide="raise"):
        result = run(name, logits, value, np.ones(logits.shape, dtype=int))
        p = probabilities(result)
    assert not np.isnan(result).any() and np.isfinite(result).any() and abs(p.sum() - 1) < 1e-12
    assert np.all(np.isinf(result) | np.isfinite(logits))  # what was removed stays removed


@pytest.mark.parametrize("name", FILTERS)
def test_filters_leave_what_they_keep_in_proportion(name):
    """Whatever a filter keeps, its relative probabilities are unchanged (temperature aside, whose job is to change them)."""
    if name == "temperature":
        return
    logits = np.random.default_rng(1).normal(0, 3, (4, 50))
    value = EXACT[name][0][2]
    result = SAMPLERS[name](logits, value)
    kept = np.isfinite(result)
    assert np.array_equal(result[kept], logits[kept]) and np.all(result[~kept] == -INF)


def test_temperature_towards_its_limits():
    logits = np.array([[1.0, 3.0, 3.0, 2.0]])
    assert probabilities(temperature(logits, 0)).tolist() == [[0, 1, 0, 0]]  # said: the lowest id
    for value in (1e-3, 1e-300, 5e-324):
        for dtype in (np.float32, np.float64):
            np.testing.assert_allclose(probabilities(temperature(logits.astype(dtype), value)), [[0, 0.5, 0.5, 0]], atol=1e-300)
    np.testing.assert_allclose(probabilities(temperature(logits, 1e12)), 0.25, rtol=1e-9)


def test_sums_do_not_lose_many_small_probabilities():
    """A float32 sum of 200,000 equal probabilities is off by percents; the nucleus must hold exactly half of them."""
    logits = np.zeros((1, 200_000), dtype=np.float32)
    assert abs(np.isfinite(top_p(logits, 0.5)).sum() - 100_000) <= 1
    assert draw(logits, [0.75]).item() == pytest.approx(150_000, abs=1)


def test_log_probabilities():
    logits = np.array([[1000.0, 1001.0, -INF], [0, 0, 0]])
    expected = [[-math.log(1 + math.e), 1 - math.log(1 + math.e), -INF], [-math.log(3)] * 3]
    np.testing.assert_allclose(log_probabilities(logits), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-13)])
def test_log_probability_of_one_id(dtype, tolerance):
    logits = np.random.default_rng(9).normal(0, 4, (5, 3000)).astype(dtype)
    logits[0, :7], logits[1] = -INF, logits[1] + 1000
    ids = np.array([0, 5, 2999, 17, logits[4].argmax()])
    found = log_probability(logits, ids)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, log_probabilities(logits)[np.arange(5), ids], rtol=tolerance)


@pytest.mark.parametrize("size, distinct", [(1, 1), (10, 3), (500, 500), (500, 20), (5000, 5000), (5000, 2)])
def test_ranking_the_first_is_the_beginning_of_ranking_all(size, distinct):
    keys = np.random.default_rng(size).integers(0, distinct, size) / 7
    keys[: size // 5] = INF
    everything = keys.argsort(kind="stable")
    for count in (1, 2, 63, 64, size - 1, size, 3 * size):
        if count:
            found = ranked(keys, count)
            assert len(found) >= min(count, size) and np.array_equal(found, everything[: len(found)])


@pytest.mark.parametrize("mass", [0, 1e-9, 0.3, 0.9, 0.999999, np.nextafter(1, 0)])
@pytest.mark.parametrize("spread", [0, 0.01, 1, 10])
def test_a_nucleus_of_a_large_vocabulary(mass, spread):
    """Found among the first few or among all: what ranking everything gives."""
    logits = np.random.default_rng(2).normal(0, 1, (3, 9000)).round(3) * spread
    for row, kept in zip(logits, np.isfinite(top_p(logits, mass)), strict=True):
        order = (-row).argsort(kind="stable")
        gathered = probabilities(row[None])[0][order].cumsum()
        assert sorted(np.flatnonzero(kept)) == sorted(order[: 1 + (gathered[:-1] < mass).sum()])


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(temperature=0, top_k=3, top_p=0.5, min_p=0.2, typical=0.3), dict(temperature=0, presence_penalty=1.0),
    dict(temperature=0, repetition_penalty=1.3), dict(temperature=0, frequency_penalty=-2.0), dict(temperature=0.9, top_p=0.8), dict(temperature=1),
], ids=str)  # fmt: skip
def test_choose_is_draw_of_adjust(options):
    rng = np.random.default_rng(8)
    logits, seen = rng.normal(0, 2, (40, 30)).round(1), rng.integers(0, 3, (40, 30))  # rounded: with ties
    config, uniform = SamplingConfig(**options), rng.random(40)
    assert np.array_equal(choose(logits, config, seen, seen, uniform), draw(adjust(logits, config, seen, seen), uniform))


def test_greedy_takes_the_lowest_of_equal_ids():
    assert greedy(np.array([[1.0, 5.0, 5.0], [0.0, 0.0, 0.0], [-INF, -1.0, -INF]])).tolist() == [1, 0, 1]


def test_draw_inverts_the_cumulative_distribution():
    logits = np.log([[0.5, 0.25, 0.25]])
    below = np.nextafter(1, 0)
    for uniform, expected in [(0, 0), (0.4999, 0), (0.5001, 1), (0.7499, 1), (0.7501, 2), (below, 2)]:
        assert draw(logits, [uniform]).item() == expected


@pytest.mark.parametrize("seed", range(20))
def test_draw_never_takes_an_impossible_token(seed):
    rng = np.random.default_rng(seed)
    logits = np.where(rng.random((50, 30)) < 0.8, -INF, rng.normal(0, 10, (50, 30)))
    logits[:, rng.integers(30)] = 0.0
    for uniform in (0.0, 0.5, np.nextafter(1, 0)):
        ids = draw(logits, np.full(50, uniform))
        assert np.all(np.isfinite(logits[np.arange(50), ids]))


def test_draw_of_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(3)
    logits, uniform = rng.normal(0, 2, (8, 40)), rng.random(8)
    together = draw(logits, uniform)
    assert together.tolist() == [draw(logits[b : b + 1], uniform[b : b + 1]).item() for b in range(8)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawn_frequencies(name):
    """Pearson's χ² of 20,000 draws; beyond its mean by 5 standard deviations would be a chance of less than one in 10,000."""
    rng = np.random.default_rng(4)
    x, c, n = rng.normal(0, 1.5, 6), rng.integers(0, 3, 6), 20_000
    value = EXACT[name][0][1]
    p = np.array(EXACT[name][1](x.tolist(), shares(np.exp(x).tolist()), value, c.tolist()))
    logits = run(name, x[None], value, c[None])
    found = np.bincount(draw(np.repeat(logits, n, axis=0), rng.random(n)), minlength=6)
    possible, freedom = p > 0, max((p > 0).sum() - 1, 1)
    assert found[~possible].sum() == 0
    chi2 = ((found - n * p)[possible] ** 2 / (n * p)[possible]).sum()
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_adjust_is_the_samplers_in_their_order():
    rng = np.random.default_rng(5)
    logits, seen = rng.normal(0, 2, (3, 30)), rng.integers(0, 2, (3, 30))
    drawn = seen * rng.integers(0, 3, (3, 30))
    config = SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, typical=0.8, repetition_penalty=1.3, presence_penalty=0.4,
                            frequency_penalty=0.2)
    expected = repetition_penalty(logits, 1.3, seen) - 0.4 * (drawn > 0) - 0.2 * drawn
    expected = typical(min_p(top_p(top_k(expected / 0.7, 20), 0.9), 0.02), 0.8)
    np.testing.assert_allclose(probabilities(adjust(logits, config, seen, drawn)), probabilities(expected), rtol=1e-12)
    neutral = SamplingConfig(temperature=1)
    assert adjust(logits, neutral, seen, drawn) is logits  # the other defaults change nothing and cost nothing


@pytest.mark.parametrize("wrong, message", [
    (dict(temperature=-1), "--temperature is -1: it must be at least 0"),
    (dict(temperature=math.nan), "--temperature is nan"),
    (dict(top_p=1.5), "--top-p is 1.5: it must be at most 1"),
    (dict(top_k=-1), "--top-k is -1"),
    (dict(repetition_penalty=0), "--repetition-penalty is 0: it must be at least 1"),
    (dict(max_tokens=0), "--max-tokens is 0"),
    (dict(beams=0), "--beams is 0"),
    (dict(stop=("a", "")), "--stop is empty"),
    (dict(beams=4, top_k=5), "--top-k changes how tokens are drawn, but --beams 4 draws none"),
])
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**wrong)


PEERS = {
    "temperature": ("TemperatureLogitsWarper", [0.3, 2.0]),
    "top_k": ("TopKLogitsWarper", [1, 7, 40]),
    "top_p": ("TopPLogitsWarper", [0.1, 0.5, 0.95]),
    "min_p": ("MinPLogitsWarper", [0.02, 0.3]),
    "typical": ("TypicalLogitsWarper", [0.2, 0.9]),
    "repetition_penalty": ("RepetitionPenaltyLogitsProcessor", [1.2, 3.0]),
}


@pytest.mark.peers
@pytest.mark.parametrize("name, value", [(name, value) for name, (_, values) in PEERS.items() for value in values])
def test_transformers_agrees(name, value):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rng = np.random.default_rng(6)
    logits, ids = rng.normal(0, 3, (20, 100)), rng.integers(0, 100, (20, 12))
    counts = np.stack([np.bincount(row, minlength=100) for row in ids])
    theirs = getattr(transformers, PEERS[name][0])(value)(torch.tensor(ids), torch.tensor(logits))
    np.testing.assert_allclose(probabilities(run(name, logits, value, counts)), torch.softmax(theirs, -1).numpy(), rtol=1e-10)


DEVICE = [*(("top_k", k) for k in (1, 3, 39, 40, 41)), *((name, mass) for name in ("top_p", "typical") for mass in (1e-9, 0.3, 0.9, 1.0)),
          ("min_p", 0.2), ("temperature", 0), ("temperature", 0.3)]  # fmt: skip


@pytest.mark.parametrize("name, value", DEVICE)
def test_a_device_keeps_the_same_without_a_wait(name, value):
    """Rows with ties, tokens that are gone already, a single one left, all alike."""
    x = np.random.default_rng(0).integers(-3, 4, (6, 40)).astype(np.float64)
    x[1, ::3], x[2, 1:], x[3] = -INF, -INF, 0
    with np.errstate(invalid="ignore"), fake_cupy.forbidden():
        ours, theirs = SAMPLERS[name](fake_cupy.asarray(x), value), SAMPLERS[name](x, value)
    assert np.array_equal(ours.get(), theirs)
