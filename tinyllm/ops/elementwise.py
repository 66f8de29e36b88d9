"""One number in, one number out, at every position. Shapes broadcast; the engine sums gradients back over broadcast axes.

For y = f(x) the Jacobian is diagonal, so the backward is dx = dy·f'(x). Where f'(x) is cheap to write with y, the closure keeps y.
"""
from tinyllm.backend import array_module
from tinyllm.tensor import op


@op
def add(a, b):
    """y = a + b.   da = dy, db = dy."""
    return a + b, lambda dy: (dy, dy)


@op
def sub(a, b):
    """y = a - b.   da = dy, db = -dy."""
    return a - b, lambda dy: (dy, lambda: -dy)


@op
def mul(a, b):
    """y = a·b.   da = dy·b, db = dy·a."""
    return a * b, lambda dy: (lambda: dy * b, lambda: dy * a)


@op
def div(a, b):
    """y = a/b.   da = dy/b, db = -dy·a/b²."""
    return a / b, lambda dy: (lambda: dy / b, lambda: -dy * a / (b * b))


@op
def neg(x):
    """y = -x.   dx = -dy."""
    return -x, lambda dy: -dy


@op
def pow(x, *, exponent):
    """y = xⁿ for a constant n.   dx = dy·n·xⁿ⁻¹; for n = 0 that is 0 also at x = 0, where xⁿ⁻¹ is infinite."""
    return x**exponent, lambda dy: dy * exponent * x ** (exponent - 1) if exponent else dy * 0


@op
def exp(x):
    """y = eˣ.   dx = dy·y."""
    y = array_module(x).exp(x)
    return y, lambda dy: dy * y


@op
def log(x):
    """y = ln x.   dx = dy/x."""
    return array_module(x).log(x), lambda dy: dy / x


@op
def sqrt(x):
    """y = √x.   dx = dy/(2y)."""
    y = array_module(x).sqrt(x)
    return y, lambda dy: dy / (2 * y)


@op
def abs(x):
    """y = |x|.   dx = dy·sign(x), which takes 0 at the corner x = 0."""
    xp = array_module(x)
    return xp.abs(x), lambda dy: dy * xp.sign(x)


@op
def tanh(x):
    """y = tanh x.   dx = dy·(1 - y²)."""
    y = array_module(x).tanh(x)
    return y, lambda dy: dy * (1 - y * y)


@op
def sigmoid(x):
    """y = 1/(1 + e⁻ˣ).   dx = dy·y·(1 - y).

    Computed as (1 + tanh(x/2))/2, the same function, which cannot overflow.
    """
    y = (array_module(x).tanh(x * 0.5) + 1) * 0.5
    return y, lambda dy: dy * y * (1 - y)


@op
def maximum(a, b):
    """y = max(a, b).   dy goes to the larger; each gets half where they are equal, so that swapping a and b changes nothing."""
    xp = array_module(a)
    y = xp.maximum(a, b)
    share = (xp.greater(a, b).astype(y.dtype) + xp.greater_equal(a, b)) * 0.5  # 1 where a is larger, 0 where b is, ½ where equal
    return y, lambda dy: (lambda: dy * share, lambda: dy * (1 - share))


@op
def minimum(a, b):
    """y = min(a, b).   dy goes to the smaller; each gets half where they are equal."""
    xp = array_module(a)
    y = xp.minimum(a, b)
    share = (xp.less(a, b).astype(y.dtype) + xp.less_equal(a, b)) * 0.5
    return y, lambda dy: (lambda: dy * share, lambda: dy * (1 - share))


@op
def where(condition, a, b):
    """y = a where condition holds (true, or not 0), else b.   dy goes to whichever was taken."""
    xp = array_module(next((x for x in (a, b) if hasattr(x, "dtype")), condition))  # a mask may come from the host
    condition = xp.asarray(condition, dtype=bool)  # of integers, ~ would be the bitwise complement
    return xp.where(condition, a, b), lambda dy: (None, lambda: dy * condition, lambda: dy * ~condition)


@op
def clip(x, *, low, high):
    """y = x held within [low, high].   dx = dy inside and on the bounds, 0 outside, where y does not move with x."""
    inside = (x >= low) & (x <= high)
    return array_module(x).clip(x, low, high), lambda dy: dy * inside


@op
def masked_fill(x, mask, *, value):
    """y = value where mask is true (or not 0), else x.   dx = dy where the mask is false."""
    xp = array_module(x)
    mask = xp.asarray(mask, dtype=bool)
    return xp.where(mask, xp.asarray(value, dtype=x.dtype), x), lambda dy: (dy * ~mask, None)
