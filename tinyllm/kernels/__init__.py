"""Faster twins of some ops and modules. A kernel has its op's signature and its (y, backward) contract, and is attached from outside.

The ops do not know their kernels: `attach` puts one in an op's place for the arrays that it is made for, and everything else still
goes to the op; `attach_module` does the same for a method of a module. Without this package the library works as before, only slower;
tests hold each kernel to its op.

cpu    NumPy over blocks of rows on all cores        cuda   CUDA C through CuPy, loaded when a device is first used
known  which blocks the kernels of whole modules are made for     packed   documents that share rows, for kernels of attention
"""
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from tinyllm.anomaly import looking_for_anomalies
from tinyllm.backend import array_module, when_device_is_used
from tinyllm.tensor import OPS

KERNELS: dict[str, dict[str, Callable]] = {"cpu": {}, "cuda": {}}  # by device and name of the op: what the tests must cover
MODULES: dict[str, set[tuple[type, str]]] = {"cpu": set(), "cuda": set()}  # (class, method) by device, likewise
_methods: dict[tuple[type, str], tuple[Callable, Callable]] = {}  # (class, method): (its own, the one that asks its kernels first)


def attach(op: Callable, device: str = "cpu", at_least: int = 0) -> Callable:
    """A decorator: the function takes `op`'s place for arrays on that device.

    device : "cpu" means NumPy floats of one precision, "cuda" any arrays of a GPU's array library.
    at_least : elements of the first array below which the op itself is the faster.

    A kernel may return NotImplemented where it is not made for the case. Of several, the one attached last is asked first, the op last.
    """
    fits = _on_cpu if device == "cpu" else _on_device

    def decorate(kernel):
        otherwise = op.run

        def choose(*arrays, **settings):
            fit = fits(arrays) and (not at_least or arrays[0].size >= at_least)
            result = kernel(*arrays, **settings) if fit else NotImplemented
            return otherwise(*arrays, **settings) if result is NotImplemented else result

        op.run = choose
        KERNELS[device][op.__name__] = kernel
        return kernel

    return decorate


def attach_module(cls: type, method: str = "forward", device: str = "cpu") -> Callable:
    """A decorator: kernel(module, *inputs, **settings) is asked before the method, for what only a whole module can save.

    It returns the method's result, or NotImplemented where it is not made for the case. Of several, the one attached last is asked first.
    """

    def decorate(kernel):
        otherwise = getattr(cls, method)

        @functools.wraps(otherwise)
        def ask(self, *inputs, **settings):
            result = NotImplemented if looking_for_anomalies() else kernel(self, *inputs, **settings)  # which are named by op
            return otherwise(self, *inputs, **settings) if result is NotImplemented else result

        plain, _ = _methods.get((cls, method), (otherwise, None))
        _methods[cls, method] = (plain, ask)
        MODULES[device].add((cls, method))
        setattr(cls, method, ask)
        return kernel

    return decorate


@contextmanager
def plain_ops() -> Iterator[None]:
    """Inside this block every op and module is computed by its definition, for comparisons. Not meant for use from several threads."""
    attached = {op: op.run for op in OPS.values()}
    try:
        for op in attached:
            op.run = op.array
        for (cls, method), (plain, _) in _methods.items():
            setattr(cls, method, plain)
        yield
    finally:
        for op, run in attached.items():
            op.run = run
        for (cls, method), (_, ask) in _methods.items():
            setattr(cls, method, ask)


def _on_cpu(arrays) -> bool:
    first = arrays[0]
    if not isinstance(first, np.ndarray) or first.dtype.char not in "fd":
        return False
    return all(x is None or (isinstance(x, np.ndarray) and (x.dtype == first.dtype or x.dtype.kind in "iub")) for x in arrays)


def _on_device(arrays) -> bool:
    return any(array_module(x) is not np for x in arrays if x is not None)


@when_device_is_used
def _attach_cuda() -> None:
    import tinyllm.kernels.cuda
