"""From scores to the next id: each sampler is a pure function of an array of logits, one row a text.     (B, V) -> (B, V)

Penalties lower the logits of tokens that the text has already. Filters remove tokens by setting their logit to -inf, and never all
of them. What is left is drawn from by probability. With `p` we always mean softmax(logits), the -inf of earlier filters included,
so filters combine: each one sees what the one before has left.

Ranking. Where tokens are ranked, equal ones come by lowest id first, so that exactly k remain after top_k(logits, k). On the CPU only the
first ones are ever put in order (see `ranked`): sorting a large vocabulary takes longer than a small model takes to score it. On a GPU all
are (see `_first`): it sorts sooner than the host could look at a number to decide what to do, and the host never waits for it here.
Sums over the vocabulary are taken in float64: in float32, thousands of small probabilities would round away.
"""
import math

import numpy as np

from tinyllm.backend import array_module
from tinyllm.ops.softmax import log_softmax, softmax


def probabilities(logits):
    """p = softmax(logits), in float64.     (B, V) -> (B, V)"""
    return softmax.array(logits.astype("float64"))[0]


def log_probabilities(logits):
    """ln p, in float64; -inf where p = 0.     (B, V) -> (B, V)"""
    return log_softmax.array(logits.astype("float64"))[0]


def log_probability(logits, ids):
    """ln p of one id a row: x - max x - ln Σe^(x - max x).     (B, V), (B,) int -> (B,) float64

    The powers are taken in the precision of the logits, whose own rounding weighs as much.
    """
    xp = array_module(logits)
    top = logits.max(-1)
    total = xp.exp(logits - top[:, None]).sum(-1, dtype="float64")
    return (logits[xp.arange(len(logits)), ids] - top).astype("float64") - xp.log(total)


# ---- penalties: (logits, strength, counts (B, V) int: how often each token occurs) ----

def repetition_penalty(logits, penalty, counts):
    """x ← x/penalty if x > 0, else x·penalty, for tokens that occur.

    Keskar et al. 2019 (CTRL), section 4.1, divide every x; a negative one would rise by that, so it is multiplied instead, as is
    customary. Where a model puts the zero of its logits is an accident of its training, and this penalty depends on it: the two
    below do not.
    """
    if penalty == 1:
        return logits
    xp = array_module(logits)
    return xp.where(counts > 0, xp.where(logits > 0, logits / penalty, logits * penalty), logits)


def presence_penalty(logits, penalty, counts):
    """x ← x - penalty, for tokens that occur, however often. Source: OpenAI's API reference."""
    return logits - penalty * (counts > 0) if penalty else logits


def frequency_penalty(logits, penalty, counts):
    """x ← x - penalty·count. Source: OpenAI's API reference."""
    return logits - penalty * counts if penalty else logits


# ---- temperature and filters: (logits, value) ----

def temperature(logits, value):
    """x ← (x - max x)/value: p sharpens below 1 and flattens above.

    0 is the limit, greedy: the likeliest token alone remains, of several the lowest id (in the limit they would share).
    Taking the maximum away first changes no probability, and keeps x/value finite there however small the value.
    """
    if value == 1:
        return logits
    xp = array_module(logits)
    if value == 0:
        return xp.where(xp.arange(logits.shape[-1]) == greedy(logits)[:, None], logits, -math.inf)
    with np.errstate(over="ignore"):  # too low for float64 is -inf, as it should be
        return (logits - logits.max(-1, keepdims=True)).astype("float64") / value


def top_k(logits, k):
    """Keep the k likeliest tokens; 0, or k ≥ V, keeps all. Source: Fan et al. 2018."""
    if not 0 < k < logits.shape[-1]:
        return logits
    if array_module(logits) is not np:
        return _first(logits, (-logits).argsort(-1, kind="stable"), k)
    return _only(logits, [ranked(-row, k)[:k] for row in logits])


def top_p(logits, mass):
    """Keep the smallest set of likeliest tokens that holds at least this mass: rank by p, stop once Σp ≥ mass ("nucleus").

    Source: Holtzman et al. 2020, section 3.1.
    """
    return logits if mass >= 1 else _nucleus(logits, -logits, mass)


def min_p(logits, share):
    """Keep tokens with p ≥ share·max p, that is x ≥ max x + ln share. Source: Nguyen et al. 2024."""
    if share == 0:
        return logits
    xp = array_module(logits)
    return xp.where(logits >= logits.max(-1, keepdims=True) + math.log(share), logits, -math.inf)


def typical(logits, mass):
    """Keep the tokens whose surprise -ln p is closest to the expected one, the entropy H = -Σ p·ln p, until Σp ≥ mass.

    People neither say the most predictable thing all the time nor the least; the likeliest token may well be removed.
    Source: Meister et al. 2022 ("Locally Typical Sampling"), eq. 11.
    """
    if mass >= 1:
        return logits
    xp = array_module(logits)
    p, log_p = probabilities(logits), log_probabilities(logits)
    entropy = -(p * xp.where(p > 0, log_p, 0)).sum(-1, keepdims=True)
    return _nucleus(logits, xp.abs(-log_p - entropy), mass)


def ranked(keys, count):
    """The ids of the smallest keys in order, equal ones by lowest id: at least `count` of them, or all.     (V,) -> (n,) int

    Only a few are put in order. Of the least keys of many chunks, take the count-th as a bound: `count` chunks have a key that is no
    larger, so the `count` smallest keys of all are no larger either, and not many others.
    """
    xp = array_module(keys)
    size = len(keys) // (4 * count)
    if size < 2:
        ids = xp.arange(len(keys))
    else:
        least = keys[: len(keys) // size * size].reshape(-1, size).min(-1)
        ids = xp.flatnonzero(~(keys > xp.partition(least, count - 1)[count - 1]))  # of NaN, all: they are reported later
    return ids[keys[ids].argsort(kind="stable")]


def _nucleus(logits, keys, mass):
    """Keep the fewest ids of the smallest keys that hold at least `mass`: those before which less than that is gathered, and the first."""
    chances = probabilities(logits)
    if array_module(logits) is not np:
        order = keys.argsort(-1, kind="stable")
        gathered = array_module(logits).take_along_axis(chances, order, -1).cumsum(-1)
        return _first(logits, order, 1 + (gathered[:, :-1] < mass).sum(-1, keepdims=True))
    kept = []
    for key, p in zip(keys, chances, strict=True):
        count = 64  # the mass is usually held by a few, which are cheap to find
        ids = ranked(key, count)
        while (gathered := p[ids].cumsum())[-1] < mass and len(ids) < len(key):
            count *= 64
            ids = ranked(key, count)
        kept.append(ids[: 1 + int((gathered[:-1] < mass).sum())])
    return _only(logits, kept)


def _only(logits, kept):
    """-inf for every id but those in kept[b]."""
    xp = array_module(logits)
    result = xp.full_like(logits, -math.inf)
    for row, ids in enumerate(kept):
        result[row, ids] = logits[row, ids]
    return result


def _first(logits, order, count):
    """-inf for every id but the first ones of each row's order: `_only` without a look at any value.     (B, V) twice, (B, 1) or number"""
    xp = array_module(logits)
    kept = xp.where(xp.arange(logits.shape[-1]) < count, xp.take_along_axis(logits, order, -1), -math.inf)
    result = xp.empty_like(kept)
    result[xp.arange(len(logits))[:, None], order] = kept
    return result


# ---- the choice: (B, V) -> (B,) int ----

def greedy(logits):
    """The likeliest id, the lowest of several."""
    return logits.argmax(-1)


def draw(logits, uniform):
    """One id a row with probability p, from one number in [0, 1) a row: the first id at which Σp exceeds it (inverse CDF).

    A row's id depends on that row's logits and number alone.     (B, V), (B,) -> (B,)
    """
    xp = array_module(logits)
    gathered = xp.cumsum(probabilities(logits), -1)
    target = xp.asarray(uniform, dtype="float64") * gathered[:, -1]  # the last is 1, but for rounding; target stays below it
    return (gathered <= target[:, None]).sum(-1)


# Every sampler by the name of its setting, in the order in which `adjust` applies them. The tests must know each of them.
PENALTIES = {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
FILTERS = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical": typical}
SAMPLERS = PENALTIES | FILTERS


def adjust(logits, config, seen, drawn):
    """Logits after all samplers of a SamplingConfig: penalties first, then temperature, then filters.

    seen, drawn : (B, V) int, how often each token occurs in prompt and continuation together, and in the continuation alone.
    Repetition is judged by the first, as Keskar et al. do; presence and frequency by the second, as OpenAI's API does.
    """
    for name, penalty in PENALTIES.items():
        logits = penalty(logits, getattr(config, name), seen if name == "repetition_penalty" else drawn)
    for name, sampler in FILTERS.items():
        logits = sampler(logits, getattr(config, name))
    return logits


def penalises(config) -> bool:
    """Whether a SamplingConfig's penalties change anything; only then must tokens be counted."""
    return (config.repetition_penalty, config.presence_penalty, config.frequency_penalty) != (1, 0, 0)


def choose(logits, config, seen, drawn, uniform):
    """draw(adjust(…)); greedy decoding without penalties needs no probabilities for that.     (B, V), …, (B,) -> (B,) int

    seen, drawn : as in `adjust`; not looked at where nothing is penalised.
    """
    if config.temperature == 0 and not penalises(config):
        return greedy(logits)
    return draw(adjust(logits.astype("float64"), config, seen, drawn), uniform)
