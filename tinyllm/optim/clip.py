"""Clipping by the global norm: when the gradient of the whole model is too long, it is shortened, its direction kept."""
import math

from tinyllm.backend import array_module
from tinyllm.optim.flat import block_length, for_each


def global_norm(*arrays) -> float:
    """√(Σ x²) over all elements of the arrays: of an optimizer's `flat.grad`, or of one gradient per parameter.

    Squares are taken and added up in float64: in float32 an element of 2·10¹⁹ would have an infinite square, and small elements
    would get lost in a long sum. (float64 elements beyond 10¹⁵⁴ count as infinite.) The result does not depend on the number of
    threads. NaN and infinity come through as such.
    """
    return math.sqrt(sum(sum_of_squares(x) for x in arrays))


def sum_of_squares(x) -> float:
    """Σ x² over all elements, in float64."""
    xp, flat, length = array_module(x), x.reshape(-1), block_length(array_module(x))
    starts = range(0, flat.size, length)
    sums = xp.zeros(len(starts), xp.float64)

    def work(number, start):
        block = flat[start : start + length].astype(xp.float64)
        sums[number] = block @ block

    for_each(xp, list(enumerate(starts)), work)
    return float(sums.sum())


def clip_factor(norm: float, maximum: float) -> float:
    """What to multiply gradients of this norm by, so that their norm is at most `maximum`.

        min(1, maximum/(norm + 10⁻⁶))

    Never above 1: short gradients stay as they are. The 10⁻⁶ is PyTorch's, against norm = 0. An infinite maximum never clips.

    Raises ValueError where norm is NaN or infinite (no factor can mend that: skip the update) and where maximum is not above 0.
    Source: Pascanu, Mikolov & Bengio 2013, algorithm 1.
    """
    if not math.isfinite(norm):
        raise ValueError(f"gradients of norm {norm} cannot be clipped: skip this update")
    if not maximum > 0:
        raise ValueError(f"the maximum norm must be above 0 (infinity for no clipping), got {maximum}")
    return min(1.0, maximum / (norm + 1e-6))
