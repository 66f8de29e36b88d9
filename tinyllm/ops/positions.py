"""Telling a transformer where each token stands. Attention itself sees a set: without positions, word order would be lost.

    learned, sinusoidal   a vector per position, added to the token's
    RoPE                  queries and keys are turned by an angle proportional to their position
    ALiBi                 a penalty on attention scores, proportional to the distance
"""
import math
from dataclasses import dataclass

import numpy as np

from tinyllm.backend import array_module
from tinyllm.tensor import op


def sinusoidal_positions(count: int, width: int) -> np.ndarray:
    """The fixed table of the first transformer.     -> (count, width) float64

        table[t, 2i] = sin(t·ωᵢ)      table[t, 2i+1] = cos(t·ωᵢ)      ωᵢ = 10000^(-2i/width)

    Source: Vaswani et al. 2017, section 3.5.
    """
    angles = np.arange(count)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    table = np.zeros((count, width))
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles)[:, : width // 2]
    return table


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is stretched to contexts longer than it was trained on.

    kind : "linear" (Chen et al. 2023), "ntk" (NTK-aware, a larger base), "llama3" (Meta's Llama 3.1) or "yarn" (Peng et al. 2023).
    factor : new context / original context.   original_context : positions in training (llama3, yarn).
    low_frequency, high_frequency : turns within the original context below which a frequency is fully interpolated (llama3, yarn)
        and above which it is left alone. None is the published value: 4 for llama3, 32 for yarn.
    """

    kind: str
    factor: float
    original_context: int = 8192
    low_frequency: float = 1.0
    high_frequency: float | None = None


def rope_frequencies(head_width: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """The angle per position of each pair of components, and a factor on cos and sin (1 but for YaRN).     -> (D/2,), float

        ωᵢ = theta^(-2i/D)

    linear   ωᵢ / factor
    ntk      theta·factor^(D/(D-2)) for theta, which leaves the fastest pair as it is and divides the slowest by factor
    llama3   pairs turning more than `high_frequency` times in the original context stay, those below `low_frequency` are divided by
             factor, between them a mix that is linear in the number of turns
    yarn     the same idea, the mix linear in the pair's index between those two bounds; attention is sharpened by 0.1·ln(factor) + 1
    """
    if head_width % 2:
        raise ValueError(f"RoPE turns pairs of components, so the head width must be even, got {head_width}")
    pairs = np.arange(0, head_width, 2) / head_width
    w = theta**-pairs
    if scaling is None:
        return w, 1.0
    if scaling.kind == "linear":
        return w / scaling.factor, 1.0
    if scaling.kind == "ntk":
        return w * scaling.factor ** -(np.arange(0, head_width, 2) / max(head_width - 2, 1)), 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_context * w / (2 * math.pi)
        low, high = scaling.low_frequency, scaling.high_frequency or 4.0
        keep = (turns - low) / (high - low)
        sharpness = 1.0
    elif scaling.kind == "yarn":
        first, last = (_pair_with_turns(n, head_width, theta, scaling) for n in (scaling.high_frequency or 32.0, scaling.low_frequency))
        first, last = max(math.floor(first), 0), min(math.ceil(last), head_width - 1)
        keep = 1 - (np.arange(head_width // 2) - first) / max(last - first, 1e-3)
        sharpness = 0.1 * math.log(max(scaling.factor, 1)) + 1
    else:
        raise ValueError(f"RoPE scaling {scaling.kind!r} is unknown: use linear, ntk, llama3 or yarn")
    keep = np.clip(keep, 0, 1)
    return keep * w + (1 - keep) * w / scaling.factor, sharpness


def _pair_with_turns(turns, head_width, theta, scaling):
    """The (fractional) index of the pair that turns this often within the original context: ωᵢ·context = 2π·turns solved for i."""
    return head_width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rope_table(positions: np.ndarray, frequencies: np.ndarray, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of each position's angles.     (...), (D/2,) -> (..., D/2), (..., D/2) float64"""
    angles = positions[..., None] * frequencies
    return np.cos(angles) * sharpness, np.sin(angles) * sharpness


@op
def rope(x, cos, sin, *, interleaved=False):
    """Turn each pair (a, b) of x's components by its position's angle.     (..., T, D), (T, D/2), (T, D/2) -> (..., T, D)

        a' = a·cos - b·sin      b' = a·sin + b·cos

    A pair is (i, i + D/2), as in published Llama weights, or with `interleaved` (2i, 2i+1), as in the paper. The product of a query
    turned by m·ω and a key turned by n·ω depends on m - n alone: attention sees distances. cos and sin may have leading axes that
    broadcast over x's.

    Backward.  The inverse of a rotation is the rotation back: dx = dy turned by the opposite angle (cos, -sin).
    Source: Su et al. 2021.
    """
    if 2 * cos.shape[-1] != x.shape[-1]:  # a table of one column would broadcast
        raise ValueError(f"rope: {x.shape[-1]} components are {x.shape[-1] / 2:g} pairs, but cos and sin have {cos.shape[-1]} angles a position")
    return _turn(x, cos, sin, interleaved), lambda dy: (_turn(dy, cos, -sin, interleaved), None, None)


def _turn(x, cos, sin, interleaved):
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    a, b = x[..., first], x[..., second]
    y = array_module(x).empty_like(x)
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's penalty per position of distance, for each head: 2^(-8/H), 2^(-16/H), …, 2^-8.     -> (H,)

    For a number of heads that is not a power of two, the slopes of the next lower power, then every other one of the next higher.
    Source: Press, Smith & Lewis 2022.
    """
    lower = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 * np.arange(1, lower + 1) / lower)
    between = 2.0 ** (-8 * np.arange(1, 2 * lower + 1) / (2 * lower))
    return np.concatenate([slopes, between[::2][: heads - lower]])
