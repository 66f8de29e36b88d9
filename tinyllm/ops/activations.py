"""The nonlinear functions between two linear maps, without which a stack of layers would be a single linear map.

All act on each number alone, so dx = dy·f'(x). The gated ones (SwiGLU, GeGLU) multiply an activation with a second, linear path.
"""
import math

from tinyllm.backend import array_module
from tinyllm.ops.erf import erf_array
from tinyllm.tensor import op


@op
def relu(x):
    """y = max(x, 0).   dx = dy where x > 0."""
    positive = x > 0
    return array_module(x).maximum(x, 0), lambda dy: dy * positive


@op
def relu2(x):
    """y = max(x, 0)².   dx = dy·2·max(x, 0).     Source: So et al. 2021, "Primer"."""
    r = array_module(x).maximum(x, 0)
    return r * r, lambda dy: dy * 2 * r


@op
def gelu(x):
    """y = x·Φ(x), where Φ(x) = (1 + erf(x/√2))/2 is the chance that a standard normal number is below x.

    Backward.  Φ' = φ, the normal density e^(-x²/2)/√(2π):   dx = dy·(Φ(x) + x·φ(x))
    Source: Hendrycks & Gimpel 2016.
    """
    below, density = _normal(x)
    return x * below, lambda dy: dy * (below + x * density())


def _normal(x):
    """Φ(x), and φ(x) as a function to call when it is needed."""
    xp = array_module(x)
    below = (erf_array(x * math.sqrt(0.5)) + 1) * 0.5
    return below, lambda: xp.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))


@op
def gelu_tanh(x):
    """GELU with Φ(x) replaced by (1 + tanh u)/2, u = √(2/π)·(x + 0.044715·x³): what GPT-2 was trained with.

    Backward.  With t = tanh u and u' = √(2/π)·(1 + 3·0.044715·x²):
        dx = dy·((1 + t)/2 + x·(1 - t²)·u'/2)
    """
    xp = array_module(x)
    c = math.sqrt(2 / math.pi)
    t = xp.tanh(c * (x + 0.044715 * x * x * x))
    return x * (1 + t) * 0.5, lambda dy: dy * 0.5 * (1 + t + x * (1 - t * t) * (c * (1 + 3 * 0.044715 * x * x)))


@op
def silu(x):
    """y = x·σ(x), also called Swish.   σ' = σ(1 - σ):   dx = dy·(σ + x·σ·(1 - σ)) = dy·(σ + y·(1 - σ))"""
    s = _sigmoid(x)
    y = x * s
    return y, lambda dy: dy * (s + y * (1 - s))


def _sigmoid(x):
    return (array_module(x).tanh(x * 0.5) + 1) * 0.5  # (1 + tanh(x/2))/2 cannot overflow


@op
def swiglu(gate, up):
    """y = silu(gate)·up.     (..., F), (..., F) -> (..., F)

    Backward.  d gate = dy·up·silu'(gate)      d up = dy·silu(gate)
    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    s = _sigmoid(gate)
    return gate * s * up, lambda dy: (lambda: dy * up * s * (1 + gate * (1 - s)), lambda: dy * gate * s)


@op
def geglu(gate, up):
    """y = gelu(gate)·up.     (..., F), (..., F) -> (..., F)

    Backward.  d gate = dy·up·(Φ + gate·φ)      d up = dy·gate·Φ
    Source: Shazeer 2020.
    """
    below, density = _normal(gate)
    return gate * below * up, lambda dy: (lambda: dy * up * (below + gate * density()), lambda: dy * gate * below)
