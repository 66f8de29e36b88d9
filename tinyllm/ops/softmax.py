"""From scores to probabilities."""
from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def softmax(x, *, axis=-1):
    """p = eˣ/Σeˣ.

    Subtracting the maximum first changes nothing (it cancels) and keeps e^x from overflowing. A row of nothing but -inf has no softmax
    and gives NaN; attention, where such rows occur, decides for itself.
    Backward.  ∂pᵢ/∂xⱼ = pᵢ(δᵢⱼ - pⱼ), so
        dx = p·(dy - Σ dy·p)            raising all scores alike changes nothing: Σ dx = 0
    """
    xp = array_module(x)
    p = xp.exp(x - x.max(axis, keepdims=True))
    p /= p.sum(axis, keepdims=True)
    return p, lambda dy: p * (dy - (dy * p).sum(axis, keepdims=True))


@op
def log_softmax(x, *, axis=-1):
    """y = x - ln Σeˣ, more exact than log(softmax(x)), where small probabilities would be rounded to 0.

    Backward.  ∂yᵢ/∂xⱼ = δᵢⱼ - pⱼ:   dx = dy - p·Σ dy, with p = e^y
    """
    xp = array_module(x)
    shifted = x - x.max(axis, keepdims=True)
    y = shifted - xp.log(xp.exp(shifted).sum(axis, keepdims=True))
    return y, lambda dy: dy - xp.exp(y) * dy.sum(axis, keepdims=True)
