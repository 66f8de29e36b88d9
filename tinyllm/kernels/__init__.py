"""Faster twins of some ops and modules. A kernel has its op's signature and its (y, backward) contract, and is attached from outside.

The ops do not know their kernels: `attach` puts one in an op's place for the arrays that it is made for, and everything else still
goes to the op; `attach_module` does the same for a method of a module. Without this package the library works as before, only slower;
tests hold each kernel to its op.
"""
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from tinyllm.anomaly import looking_for_anomalies
from tinyllm.tensor import OPS

KERNELS: dict[str, Callable] = {}  # by name of the op: what the tests must cover
MODULES: dict[tuple[type, str], tuple[Callable, Callable]] = {}  # (class, method): (its own, the one that asks its kernels first); likewise


def attach(op: Callable, at_least: int = 0) -> Callable:
    """A decorator: the function takes `op`'s place where all its arrays are NumPy floats of one precision.

    at_least : elements of the first array below which the op itself is the faster.
    """

    def decorate(kernel):
        plain, name = op.array, op.__name__

        def choose(*arrays, **settings):
            fits = _fits(arrays) and arrays[0].size >= at_least
            return (kernel if fits else plain)(*arrays, **settings)

        op.run = choose
        KERNELS[name] = kernel
        return kernel

    return decorate


def attach_module(cls: type, method: str = "forward") -> Callable:
    """A decorator: kernel(module, *inputs, **settings) is asked before the method, for what only a whole module can save.

    It returns the method's result, or NotImplemented where it is not made for the case. Of several, the one attached last is asked first.
    """

    def decorate(kernel):
        otherwise = getattr(cls, method)

        @functools.wraps(otherwise)
        def ask(self, *inputs, **settings):
            result = NotImplemented if looking_for_anomalies() else kernel(self, *inputs, **settings)  # which are named by op
            return otherwise(self, *inputs, **settings) if result is NotImplemented else result

        plain, _ = MODULES.get((cls, method), (otherwise, None))
        MODULES[cls, method] = (plain, ask)
        setattr(cls, method, ask)
        return kernel

    return decorate


@contextmanager
def plain_ops() -> Iterator[None]:
    """Inside this block every op and module is computed by its definition, for comparisons. Not meant for use from several threads."""
    attached = {name: OPS[name].run for name in KERNELS}
    try:
        for name in attached:
            OPS[name].run = OPS[name].array
        for (cls, method), (plain, _) in MODULES.items():
            setattr(cls, method, plain)
        yield
    finally:
        for name, run in attached.items():
            OPS[name].run = run
        for (cls, method), (_, ask) in MODULES.items():
            setattr(cls, method, ask)


def _fits(arrays) -> bool:
    first = arrays[0]
    if not isinstance(first, np.ndarray) or first.dtype.char not in "fd":
        return False
    return all(x is None or (isinstance(x, np.ndarray) and (x.dtype == first.dtype or x.dtype.kind in "iub")) for x in arrays)
