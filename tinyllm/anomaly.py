"""Finding the first op that makes NaN or infinity, and values changed behind the engine's back. Plain functions of arrays.

Slow (every array is looked at, every input copied): for looking for a fault, not for training.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from tinyllm.backend import is_floating, to_numpy

_looking: ContextVar[bool] = ContextVar("looking for anomalies", default=False)


@contextmanager
def detect_anomaly() -> Iterator[None]:
    """`with detect_anomaly():` the first op that makes NaN or infinity out of finite arguments raises FloatingPointError.

    The message names the op and gives each argument's shape and range. An input that was changed behind the engine's back (through
    `.data`) raises RuntimeError at backward(). Slow: for looking, not for training.
    """
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)


def looking_for_anomalies() -> bool:
    """Whether `detect_anomaly` is on."""
    return _looking.get()


def check_finite(what: str, y, arguments) -> None:
    """Raise FloatingPointError if y holds NaN and no argument does, or infinity and all arguments are finite: `what` began it.

    Infinity among the arguments is no fault in itself (a mask is made of it), but NaN made from it is.
    """
    if not _is_floating(y) or np.isfinite(to_numpy(y)).all():
        return
    floats = [x for x in arguments if _is_floating(x)]
    fine = (lambda x: ~np.isnan(x)) if np.isnan(to_numpy(y)).any() else np.isfinite
    if all(fine(to_numpy(x)).all() for x in floats):
        raise FloatingPointError(f"{what} made NaN or infinity: result {describe(y)}; from {'; '.join(describe(x) for x in floats)}")


def describe(x) -> str:
    """dtype, shape and range of an array or number, and how many of its values are not finite."""
    x = to_numpy(x)
    finite = x[np.isfinite(x)]
    span = f"{float(finite.min()):.4g} … {float(finite.max()):.4g}" if finite.size else "no finite value"
    bad = x.size - finite.size
    return f"{x.dtype}{list(x.shape)} in {span}" + (f", {bad} not finite" if bad else "")


def guarded(name: str, arrays: list, backward: Callable) -> Callable:
    """`backward`, after a check that no array that it may have saved (inputs, result) was written to since the forward."""
    arrays = [x for x in arrays if hasattr(x, "dtype")]
    seen = [to_numpy(x).copy() for x in arrays]

    def checked(dy):
        for x, before in zip(arrays, seen, strict=True):
            if to_numpy(x).tobytes() != before.tobytes():
                raise RuntimeError(f"an input or the result of the op {name!r} ({describe(x)}) was changed in place between forward and backward")
        return backward(dy)

    return checked


def _is_floating(x) -> bool:
    return isinstance(x, float) or is_floating(x) or (hasattr(x, "dtype") and x.dtype.kind == "c")
