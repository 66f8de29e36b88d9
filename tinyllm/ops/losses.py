"""Losses besides cross-entropy. Each is a mean over its elements (or rows), so its size does not depend on the batch."""
from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def binary_cross_entropy(logits, targets):
    """-mean(t·ln σ(z) + (1-t)·ln(1-σ(z))) for scores z and probabilities t.     (...), (...) -> ()

    With ln σ(z) = -ln(1 + e⁻ᶻ) this is  ln(1 + eᶻ) - t·z,  computed as max(z, 0) + ln(1 + e^(-|z|)) - t·z: no exponent above 0.
    Backward.  dz = (σ(z) - t)/n      dt = -z/n
    """
    xp = array_module(logits)
    targets = xp.asarray(targets, dtype=logits.dtype)  # whole numbers times float32 would be float64
    n = logits.size
    softplus = xp.maximum(logits, 0) + xp.log1p(xp.exp(-xp.abs(logits)))
    sigmoid = (xp.tanh(logits * 0.5) + 1) * 0.5
    y = (softplus - targets * logits).sum() / n
    return y, lambda dy: (lambda: (sigmoid - targets) * (dy / n), lambda: logits * (-dy / n))


@op
def mse(a, b):
    """Mean squared error, mean((a - b)²).     (...), (...) -> ()        da = 2(a - b)/n      db = -da"""
    difference = a - b
    n = difference.size
    return (difference * difference).sum() / n, lambda dy: (lambda: difference * (2 * dy / n), lambda: difference * (-2 * dy / n))


@op
def kl_divergence(log_p, log_q):
    """KL(p ‖ q) = Σ p·(ln p - ln q) over the last axis, averaged over rows; both are given as log-probabilities.  (..., V) ×2 -> ()

    Backward.  With p = e^log_p:      d log_p = p·(ln p - ln q + 1)/N      d log_q = -p/N
    (p is taken as free: a log_softmax before it projects the gradient onto what keeps Σ p = 1.) Where p = 0 its term is 0, its limit.
    """
    xp = array_module(log_p)
    p = xp.exp(log_p)
    ratio = xp.where(p > 0, log_p, 0) - xp.where(p > 0, log_q, 0)  # before subtracting: -inf - -inf is NaN
    rows = p.size // p.shape[-1]
    return (p * ratio).sum() / rows, lambda dy: (lambda: p * (ratio + 1) * (dy / rows), lambda: p * (-dy / rows))
