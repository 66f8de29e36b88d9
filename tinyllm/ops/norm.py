"""Normalisation: every row is brought to a standard size, so that no layer has to cope with the scale of what came before it."""
from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def layernorm(x, w=None, b=None, *, eps=1e-5):
    """Bring each row to mean 0 and variance 1, then scale and shift.     (..., C), (C,), (C,) -> (..., C)

        μ = mean(x)      r = 1/√(var(x) + eps)      x̂ = r·(x - μ)      y = x̂·w + b          (w: gain, b: bias, each optional)

    Backward.  y depends on x directly, through μ, and through r. With dx̂ = dy·w:
        dx = r·(dx̂ - mean(dx̂) - x̂·mean(dx̂·x̂))
    The two means take out what the row cannot do: shifting or scaling x changes nothing.
        dw = Σ_rows dy·x̂      db = Σ_rows dy
    Source: Ba, Kiros & Hinton 2016.
    """
    xp = array_module(x)
    centred = x - x.mean(-1, keepdims=True)
    r = 1 / xp.sqrt((centred * centred).mean(-1, keepdims=True) + eps)  # (..., 1)
    x_hat = centred * r
    y = x_hat if w is None else x_hat * w
    y = y if b is None else y + b

    def backward(dy):
        dx_hat = dy if w is None else dy * w
        dx = r * (dx_hat - dx_hat.mean(-1, keepdims=True) - x_hat * (dx_hat * x_hat).mean(-1, keepdims=True))
        return dx, (lambda: _over_rows(dy * x_hat)), (lambda: _over_rows(dy))

    return y, backward


@op
def rmsnorm(x, w=None, *, eps=1e-6):
    """Scale each row to unit root-mean-square, then by a gain.     (..., C), (C,) -> (..., C)

        r = 1/√(mean(x²) + eps)      x̂ = r·x      y = x̂·w

    Backward.  y depends on x directly and through r (dr/dx = -r³·x/C), so with dx̂ = dy·w
        dx = r·(dx̂ - x̂·mean(dx̂·x̂))       without the component along x̂: scaling x changes nothing
        dw = Σ_rows dy·x̂
    Source: Zhang & Sennrich 2019, eq. 4.
    """
    xp = array_module(x)
    r = 1 / xp.sqrt((x * x).mean(-1, keepdims=True) + eps)  # (..., 1)
    x_hat = x * r

    def backward(dy):
        dx_hat = dy if w is None else dy * w
        dx = r * (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdims=True))
        return dx, lambda: _over_rows(dy * x_hat)

    return x_hat if w is None else x_hat * w, backward


def _over_rows(dy):
    """Σ over all axes but the last.     (..., C) -> (C,)"""
    return dy.sum(tuple(range(dy.ndim - 1)))
