"""Is a backward right? Compare it with what the forward does when its inputs move a little. For our tests, and for yours:

    from tinyllm import gradcheck
    report = gradcheck(my_function, x, w)        # arrays in float64; my_function takes and returns Tensors
    assert report, report                        # prints the worst element of the worst input

Whatever the output's shape, it is made a scalar with a random upstream gradient dy (ones would hide a transposed result):

    L(x) = Σ y(x)·dy            checked: dL/dx from backward(dy) against one of

    central      (8·[L(x+h) - L(x-h)] - [L(x+2h) - L(x-2h)]) / 12h      for every element; error O(h⁴), so h need not be tiny
    projection   the same along random directions v: Σ dL/dx·v          for functions too big to go through element by element
    complex      Im L(x + ih) / h                                       no subtraction, so no rounding error at all; only where every
                                                                        operation is analytic (no abs, max, comparison)
The error of an element is |analytic - numeric| / the largest gradient of that input. Gradients all smaller than what rounding leaves
of a difference of two values of L cannot be told from zero; the scale never goes below that.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyllm.backend import random_stream
from tinyllm.tensor import Tensor, no_grad

STEP = {"central": 1e-4, "projection": 1e-4, "complex": 1e-30}
LONGEST = 5.0  # a direction's norm, so that the error O(h⁴) does not grow with the number of elements
FINEST = 1e-9  # a tolerance that finite differences in float64 can still keep
NOISE = 1e-11  # of a difference quotient with these steps, relative to L


@dataclass(frozen=True)
class InputReport:
    """The worst element (or direction) of one input."""

    name: str
    shape: tuple[int, ...]
    error: float
    where: tuple[int, ...] | str
    analytic: float
    numeric: float

    def __str__(self) -> str:
        return f"{self.name}{list(self.shape)}: error {self.error:.2e} at {self.where}: backward {self.analytic:.10g}, numeric {self.numeric:.10g}"


@dataclass(frozen=True)
class Report:
    """What gradcheck found: true where every error is within the tolerance, printable, `.worst` names the worst element."""

    inputs: tuple[InputReport, ...]
    tolerance: float

    @property
    def worst(self) -> InputReport:
        return max(self.inputs, key=lambda r: r.error if r.error == r.error else float("inf"))  # NaN is the worst of all

    @property
    def error(self) -> float:
        return self.worst.error

    def __bool__(self) -> bool:
        return bool(self.error <= self.tolerance)

    def __str__(self) -> str:
        verdict = "gradients agree" if self else f"gradients differ by more than {self.tolerance:g}"
        return f"{verdict}; worst: {self.worst}"


def gradcheck(
    function: Callable[..., Tensor],
    *inputs,
    parameters: dict[str, Tensor] | None = None,
    method: str = "central",
    directions: int = 10,
    step: float | None = None,
    tolerance: float = 1e-6,
    rng: np.random.Generator | None = None,
) -> Report:
    """Compare function's backward with finite differences of its forward.

    Parameters
    ----------
    function : takes the inputs as Tensors and returns one Tensor of any shape. Must give the same result each time.
    inputs : arrays or Tensors. Floating-point arrays, and Tensors that require a gradient, are checked and must be float64; integer and
        boolean arrays, Tensors that require none, and anything else are passed on as they are.
    parameters : further leaf Tensors (float64) that function reaches by itself, by name, such as dict(module.named_parameters());
        those that require no gradient are left out.
    method : "central", "projection" or "complex", see above.      directions : how many, for "projection".
    step : h; by default 1e-4, and 1e-30 for "complex".            tolerance : largest error for the report to be true, at least 1e-9.
    rng : draws the upstream gradient and the directions.

    Raises ValueError for float32 (or 16-bit) values, whose rounding would drown the difference; for nothing to check; for a function
    that is not deterministic or does not return a Tensor.
    """
    if method not in STEP:
        raise ValueError(f"gradcheck method {method!r} is unknown: use one of {', '.join(STEP)}")
    if not tolerance >= FINEST and method != "complex":
        raise ValueError(f"gradcheck: the tolerance {tolerance:g} is below {FINEST:g}, and finite differences in float64 are no more exact")
    rng = rng or random_stream(0, "gradcheck")  # not default_rng(0): users draw x from it, and where dy = x, xᵀ·dy hides a transpose
    arguments = [_leaf(x, f"input {i}") for i, x in enumerate(inputs)]
    leaves = {f"input {i}": x for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.requires_grad}
    for name, parameter in (parameters or {}).items():
        if parameter.requires_grad:
            _refuse_low_precision(parameter.data, name)
            leaves[name] = parameter
    if not leaves:
        raise ValueError("gradcheck: nothing to check, since no input is a floating-point array that requires a gradient")
    y = function(*arguments)
    if not isinstance(y, Tensor):
        raise ValueError(f"gradcheck: function must return one Tensor, got {type(y).__name__}")
    _refuse_low_precision(y.data, "the result")
    dy = np.asarray(rng.standard_normal(y.shape))
    if not np.array_equal(y.data, function(*arguments).data, equal_nan=True):
        raise ValueError("gradcheck: function gave two different results for the same input; draw its randomness from a fixed seed inside")
    analytic = _gradients(y, dy, leaves)
    floor = NOISE * max(1.0, np.abs(y.data * dy).sum()) / tolerance if method != "complex" else 1e-12
    check = _by_direction if method == "projection" else _by_element
    reports = []
    for name, leaf in leaves.items():
        slope = _slope(function, arguments, dy, leaf, method, step or STEP[method])
        reports.append(check(name, analytic[name], slope, floor, directions, rng))
    return Report(tuple(reports), tolerance)


def _gradients(y, dy, leaves) -> dict[str, np.ndarray]:
    """What backward says. The leaves' own `.grad` is put back, since a user's parameters may hold one."""
    kept = {name: leaf.grad for name, leaf in leaves.items()}
    try:
        for leaf in leaves.values():
            leaf.grad = None
        y.backward(dy)
        return {name: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    finally:
        for name, leaf in leaves.items():
            leaf.grad = kept[name]


def _leaf(x, name):
    """A differentiable copy of a floating-point array; anything else as it is."""
    data = x.data if isinstance(x, Tensor) else x
    if not isinstance(data, np.ndarray) or data.dtype.kind != "f" or (isinstance(x, Tensor) and not x.requires_grad):
        return x
    _refuse_low_precision(data, name)
    return Tensor(data.copy(), requires_grad=True)


def _refuse_low_precision(data, name):
    if data.dtype != np.float64:
        raise ValueError(
            f"gradcheck: {name} is {data.dtype}, but finite differences need float64: with fewer digits the difference of two "
            "nearly equal values is mostly rounding error. Use .astype(np.float64)"
        )


def _scalar(function, arguments, dy):
    with no_grad():
        return (function(*arguments).data * dy).sum()


def _slope(function, arguments, dy, leaf, method, h):
    """A function v -> numeric directional derivative of L along v, an array of leaf's shape."""
    x = leaf.data

    def value(moved):
        leaf.data = moved
        try:
            return _scalar(function, arguments, dy)
        finally:
            leaf.data = x

    if method == "complex":
        return lambda v: value(x + 1j * h * v).imag / h
    return lambda v: float(8 * (value(x + h * v) - value(x - h * v)) - (value(x + 2 * h * v) - value(x - 2 * h * v))) / (12 * h)


def _by_element(name, analytic, slope, floor, directions, rng) -> InputReport:
    numeric = np.zeros(analytic.shape)
    unit = np.zeros(analytic.shape)
    for index in np.ndindex(*analytic.shape):
        unit[index] = 1
        numeric[index] = slope(unit)
        unit[index] = 0
    if not analytic.size:
        return InputReport(name, analytic.shape, 0.0, "no elements", 0.0, 0.0)
    sizes = np.abs([analytic, numeric])
    scale = max(sizes[np.isfinite(sizes)].max(initial=0.0), floor)
    errors = np.abs(analytic - numeric) / scale
    worst = np.unravel_index(np.argmax(np.where(np.isnan(errors), np.inf, errors)), errors.shape)
    where = tuple(int(i) for i in worst)
    return InputReport(name, analytic.shape, float(errors[worst]), where, float(analytic[worst]), float(numeric[worst]))


def _by_direction(name, analytic, slope, floor, directions, rng) -> InputReport:
    found = []
    for i in range(directions):
        length = min(1.0, LONGEST / np.sqrt(max(analytic.size, 1)))  # without it, a step with n elements would be √n·h long
        v = rng.standard_normal(analytic.shape) * length
        expected, numeric = float((analytic * v).sum()), slope(v)
        scale = max(np.sqrt((analytic**2).sum()) * length, abs(numeric), floor)  # √Σg² is the typical size of Σ g·v at length 1
        found.append(InputReport(name, analytic.shape, float(abs(expected - numeric) / scale), f"direction {i}", expected, numeric))
    return max(found, key=lambda r: r.error if r.error == r.error else float("inf"))
