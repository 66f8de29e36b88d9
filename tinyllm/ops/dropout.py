"""Switching off a random part of the values in training, so that no value is relied on alone."""
from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def dropout(x, *, rate, rng):
    """Set each element to 0 with probability `rate`, and scale the others by 1/(1-rate), so that the mean stays.     (...) -> (...)

    Backward.  The same elements are dropped: dx = dy·mask/(1-rate).
    rng : np.random.Generator; the caller's stream decides which elements fall.     Source: Srivastava et al. 2014.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
    xp = array_module(x)
    kept = xp.asarray(rng.random(x.shape, dtype="float32") >= rate)
    scaled = kept.astype(x.dtype) * (1 / (1 - rate))
    return x * scaled, lambda dy: dy * scaled
