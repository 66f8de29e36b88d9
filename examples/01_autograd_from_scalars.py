"""Automatic differentiation from nothing: single numbers first, in forty lines, then arrays with tinyllm.Tensor.

A formula is made of small steps, and the derivative of each step is a rule from school. If every number remembers which steps made
it, the chain rule can walk back through them and tell how the result depends on each input. You will see

    1. such a number, `Value`, on a formula small enough to differentiate in your head
    2. a longer formula, checked against finite differences and against published figures
    3. why the order of the walk matters: a formula with 2⁵⁰ paths, differentiated in 50 steps
    4. the same formula in tinyllm, for three points at once

    python examples/01_autograd_from_scalars.py
"""
import itertools
from functools import partial

import numpy as np

from tinyllm import Tensor, ops


class Value:
    """A number that remembers what it was made of.

    made_of : pairs (x, ∂self/∂x), one for each number that it was computed from; none for an input.
    grad    : ∂result/∂self, once result.backward() has run.
    number  : how many were born before it. Nothing can be made of numbers that come later.
    """

    births = itertools.count()

    def __init__(self, data, made_of=()):
        self.data, self.made_of, self.grad, self.number = data, made_of, 0.0, next(Value.births)

    # Four steps with a derivative of their own …
    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, [(self, 1.0), (other, 1.0)])

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, [(self, other.data), (other, self.data)])

    def __pow__(self, n):
        return Value(self.data**n, [(self, n * self.data ** (n - 1))])

    def relu(self):
        return Value(max(self.data, 0.0), [(self, 1.0 if self.data > 0 else 0.0)])

    # … and the rest is made of those, so it needs no rule.
    __radd__, __rmul__ = __add__, __mul__
    __neg__ = lambda self: self * -1.0
    __sub__, __rsub__ = lambda self, other: self + -other, lambda self, other: -self + other
    __truediv__ = lambda self, other: self * other**-1.0
    __rtruediv__ = lambda self, other: other * self**-1.0

    def backward(self):
        """The chain rule:  ∂result/∂x = Σ ∂result/∂y · ∂y/∂x  over every y that x helped to make. Returns how many numbers it visits.

        From the youngest to the oldest, because then all of y's own sum has arrived before y passes its part on.
        """
        family, new = {self}, [self]
        while new:
            born_before = {x for x, _ in new.pop().made_of} - family
            family |= born_before
            new += born_before
        self.grad = 1.0
        for y in sorted(family, key=lambda value: value.number, reverse=True):
            for x, slope in y.made_of:
                x.grad += y.grad * slope
        return len(family)


def longer_formula(a, b, relu):
    """The example in the README of micrograd (Karpathy 2020), which publishes its results. For floats, Values or Tensors alike."""
    c, d = a + b, a * b + b**3
    c = c + c + 1
    c = c + 1 + c - a
    d = d + d * 2 + relu(b + a)
    d = d + 3 * d + relu(b - a)
    e = c - d
    f = e**2
    return f / 2.0 + 10.0 / f


def finite_differences(a, b, h=1e-4):
    """Both derivatives of longer_formula without any rule, in plain floats: move one input by ±h and see how far the result moves."""
    f = partial(longer_formula, relu=lambda x: max(x, 0.0))
    return (f(a + h, b) - f(a - h, b)) / (2 * h), (f(a, b + h) - f(a, b - h)) / (2 * h)


def with_values(a, b):
    """The formula and its two derivatives by Value."""
    a, b = Value(a), Value(b)
    g = longer_formula(a, b, Value.relu)
    g.backward()
    return g.data, a.grad, b.grad


def with_tensors(a, b):
    """The same by tinyllm. One Tensor of points for a, one single number for b, which takes part at all of them."""
    a, b = Tensor(np.array(a), requires_grad=True), Tensor(np.array(b), requires_grad=True)
    g = longer_formula(a, b, ops.relu)
    g.sum().backward()
    return g.numpy(), a.grad, b.grad


def doublings(count):
    """y = 2ⁿ·x as n additions h + h."""
    x = y = Value(1.0)
    for _ in range(count):
        y = y + y
    return x, y


def backward_by_paths(y, slope=1.0):
    """The chain rule without an order: follow every single path down to the inputs. Returns how many there are."""
    y.grad += slope
    return sum(backward_by_paths(x, slope * s) for x, s in y.made_of) or 1


def main():
    print("1. y = a·b + a² at a = 3, b = 2.   By hand: dy/da = b + 2a = 8, dy/db = a = 3")
    a, b = Value(3.0), Value(2.0)
    y = a * b + a**2
    y.backward()
    print(f"   Value says y = {y.data:g}, dy/da = {a.grad:g}, dy/db = {b.grad:g}.   a is used twice: its two parts, 2 and 6, add up.\n")

    print("2. A longer formula at a = -4, b = 2           g        dg/da        dg/db")
    print("   Value                             {:9.4f}    {:9.4f}    {:9.4f}".format(*with_values(-4.0, 2.0)))
    print("   finite differences                             {:9.4f}    {:9.4f}".format(*finite_differences(-4.0, 2.0)))
    print("   published (micrograd's README)      24.7041     138.8338     645.5773\n")

    x, y = doublings(12)
    paths = backward_by_paths(y)
    print(f"3. 12 doublings, path by path:  {paths:,} paths, dy/dx = {x.grad:,.0f}")
    x, y = doublings(50)
    print(f"   50 doublings, in order:      {y.backward()} numbers, dy/dx = {x.grad:,.0f} = 2⁵⁰.   Path by path this would take years.\n")

    points = [-4.0, 1.0, 3.0]
    print("4. The same formula with arrays: a holds three points, b = 2 takes part in all of them")
    g, da, db = with_tensors(points, 2.0)
    single = [with_values(a, 2.0) for a in points]
    print(f"   Tensor: dg/da = {np.array2string(da, precision=4)},   dg/db = {db:.4f}")
    print(f"   Value, point by point:  {', '.join(f'{s[1]:.4f}' for s in single)};   the three dg/db add up to {sum(s[2] for s in single):.4f}")
    print("   That is all there is to it: tinyllm/tensor.py is the walk, tinyllm/ops/ are the rules.")


if __name__ == "__main__":
    main()
