"""The error function, which NumPy lacks: erf(x) = 2/√π ∫₀ˣ e^(-t²) dt.

No elementary formula exists, so it is approximated by quotients of polynomials, accurate to the last digits of float64:

    |x| ≤ 1     erf(x) = x · T(x²)/U(x²)
    1 < |x|     erf(x) = sign(x)·(1 - e^(-x²) · P(|x|)/Q(|x|))       for |x| ≥ 6 the second term is below half a unit of the last place

The coefficients are the published minimax fits of the Cephes library (Moshier 1989, ndtr.c), highest power first.
"""
import math

from tinyllm.backend import array_module
from tinyllm.tensor import op

_T = (9.60497373987051638749, 90.0260197203842689217, 2232.00534594684319226, 7003.32514112805075473, 55592.3013010394962768)
_U = (1.0, 33.5617141647503099647, 521.357949780152679795, 4594.32382970980127987, 22629.0000613890934246, 49267.3942608635921086)
_P = (2.46196981473530512524e-10, 0.564189564831068821977, 7.46321056442269912687, 48.6371970985681366614, 196.520832956077098242,
      526.445194995477358631, 934.528527171957607540, 1027.55188689515710272, 557.535335369399327526)
_Q = (1.0, 13.2281951154744992508, 86.7072140885989742329, 354.937778887819891062, 975.708501743205489753, 1823.90916687909736289,
      2246.33760818710981792, 1656.66309194161350182, 557.535340817727675546)


def erf_array(x):
    """erf of each element.     (...) -> (...)"""
    xp = array_module(x)
    small = xp.clip(x, -1, 1)
    large = xp.clip(xp.abs(x), 1, 6)
    inner = small * _polynomial(_T, small * small) / _polynomial(_U, small * small)
    outer = xp.sign(x) * (1 - xp.exp(-large * large) * _polynomial(_P, large) / _polynomial(_Q, large))
    return xp.where(xp.abs(x) <= 1, inner, outer)


def _polynomial(coefficients, x):
    """Horner's rule: ((c₀x + c₁)x + c₂)x + …"""
    y = x * 0 + coefficients[0]
    for c in coefficients[1:]:
        y = y * x + c
    return y


@op
def erf(x):
    """y = erf(x).   dx = dy · 2/√π · e^(-x²), the integrand."""
    return erf_array(x), lambda dy: dy * (2 / math.sqrt(math.pi)) * array_module(x).exp(-x * x)
