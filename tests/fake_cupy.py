"""A fake device: a module like cupy whose arrays live in NumPy's memory, so that what is written for a GPU runs without one.

It is stricter than NumPy in every way in which CuPy is, so that what passes here has a chance there:

    NumPy arrays, np.functions     refused wherever they would meet an array of the device by accident: TypeError
    get(), item(), float(), bool() and what else makes the host wait for the device: counted in `synchronisations`, an error inside
        `with forbidden():`
    names, options                 only those that CuPy has (test_fake_device.py holds this module to the installed CuPy)
    results of no axes             arrays, never scalars
    bf16                           no batched products, no `where`; matmul of two axes gives bf16
    indices                        out of range they wrap around silently, and wrong ones go unseen

Kernels (`RawModule`) run in the emulator (fake_kernels.py). `sys.modules["cupy"] = fake_cupy` makes it the device (see device_worlds.py).
"""
import contextlib
import sys

import fake_cuda as cuda
import numpy as np
from fake_cuda import allowed, forbidden, synchronisations, synchronise  # noqa: F401
from fake_ndarray import around, asarray, checked, fill_with_noise, index_of, matrix_product, ndarray, new, operand, plain, run, sources

with contextlib.suppress(ImportError):  # CuPy imports it too where it is installed, and so NumPy learns of bfloat16
    import ml_dtypes  # noqa: F401

float16, float32, float64 = np.float16, np.float32, np.float64
int8, int16, int32, int64, uint8, uint16, uint32, uint64 = np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64
bool_, uintp, inf, nan, pi, newaxis, dtype = np.bool_, np.uintp, np.inf, np.nan, np.pi, None, np.dtype
broadcast_shapes, result_type = np.broadcast_shapes, np.result_type
__version__ = "14.2.0"

class ufunc:
    """A function of each element, with CuPy's at() and, for add alone, reduceat()."""

    def __init__(self, name):
        self.__name__, self._function = name, getattr(np, name)

    def __call__(self, *arguments, out=None, dtype=None):
        options = {name: value for name, value in (("out", out), ("dtype", dtype)) if value is not None}
        return run(self.__name__, self._function, tuple(checked(self.__name__, a) for a in arguments), options)

    def at(self, x, index, values):
        if self.__name__ not in ("add", "maximum", "minimum"):
            raise NotImplementedError(f"`{self.__name__}.at` is not supported")
        index, values = plain(index_of(index)), operand("ufunc.at", values)
        cuda.submit(lambda: self._function.at(x._values, around(x._values, index), values))

    def reduceat(self, x, indices, axis=0, dtype=None, out=None):
        if self.__name__ != "add":
            raise NotImplementedError(f"`{self.__name__}.reduceat` is not supported")
        return run("reduceat", _differences_of_running_sums, (x, checked("reduceat", indices), axis, dtype))


def _differences_of_running_sums(x, starts, axis, dtype):
    """What CuPy does for reduceat, digits lost and all."""
    sums = np.cumsum(x, axis, dtype)
    sums = np.concatenate([np.zeros_like(np.take(sums, [0], axis)), sums], axis)
    stops = np.append(starts[1:], x.shape[axis])
    return np.take(sums, stops, axis) - np.take(sums, starts, axis)


UFUNCS = """abs absolute add arccos arcsin arctan ceil cos cosh divide equal exp exp2 expm1 floor floor_divide greater greater_equal invert isfinite
isinf isnan less less_equal log log1p log2 logaddexp logical_and logical_not logical_or maximum minimum multiply negative not_equal power reciprocal
rint sign sin sinh sqrt square subtract tan tanh true_divide""".split()
FUNCTIONS = """all any argmax argmin argpartition argsort array_equal array_split broadcast_to concatenate copyto cumsum diagonal diff dot einsum expand_dims
flip inner max mean min moveaxis outer pad partition permute_dims prod ravel repeat reshape roll searchsorted sort split squeeze stack std sum swapaxes take
take_along_axis tensordot tile transpose tril triu var vdot hstack vstack atleast_1d atleast_2d nan_to_num count_nonzero""".split()
WAITING = "argwhere bincount flatnonzero nonzero unique".split()  # the shape of their result depends on the values
globals().update({name: ufunc(name) for name in UFUNCS})


def _function(name, waits=False):
    function = getattr(np, name)

    def call(*arguments, **options):
        if waits:
            synchronise(name)
        if next(sources((*arguments, *options.values())), None) is None:
            raise TypeError(f"{name}: no array of the device among the arguments")
        return run(name, function, arguments, options)

    call.__name__ = name
    return call


globals().update({name: _function(name) for name in FUNCTIONS})
globals().update({name: _function(name, waits=True) for name in WAITING})
amax, amin, matmul = max, min, lambda a, b: run("matmul", matrix_product, (checked("matmul", a), checked("matmul", b)))  # noqa: E731


def clip(x, a_min, a_max, out=None):
    return run("clip", np.clip, (x, a_min, a_max), {} if out is None else {"out": out})


def where(condition, x=None, y=None):
    if x is None:
        raise NotImplementedError("where(condition) waits for the device: write nonzero")
    for a in (condition, x, y):
        if str(getattr(a, "dtype", "")) == "bfloat16":
            raise TypeError("CuPy's where has no loop for bfloat16 arrays, and would give float32")
    if type(condition) is not ndarray:
        raise TypeError(f"where: the condition is a {type(condition).__name__}, not an array of the device")
    return run("where", np.where, (condition.astype(bool), checked("where", x), checked("where", y)))


def ix_(*arrays):
    return run("ix_", np.ix_, arrays)


# ---- making arrays ----


def array(x, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    return x.astype(dtype or x.dtype) if type(x) is ndarray else asarray(x, dtype)


def ascontiguousarray(x, dtype=None):
    x = asarray(x, dtype)
    return x if x.flags.c_contiguous and x.ndim else run("ascontiguousarray", lambda v: np.array(v, order="C", ndmin=1), (x,))


def asnumpy(x, stream=None, order="C", out=None, *, blocking=True):
    return x.get(order=order, out=out) if type(x) is ndarray else np.asarray(x)


def _made(name):
    """A function that makes an array from a shape, or one like another."""
    function = getattr(np, name)

    def make(*arguments, **options):
        like = name.endswith("_like")
        if like and type(arguments[0]) is not ndarray:
            raise TypeError(f"{name}: Unsupported type {type(arguments[0])}")
        result = new(function(*(plain(a, name) for a in arguments), **options))
        if name.startswith("empty"):
            fill_with_noise(result._values)
        elif cuda.capturing():
            values = result._values.copy()
            cuda.submit(lambda: np.copyto(result._values, values))
        return result

    make.__name__ = name
    return make


MAKERS = "empty zeros ones full empty_like zeros_like ones_like full_like arange linspace eye identity".split()
globals().update({name: _made(name) for name in MAKERS})


def copyto(dst, src, casting="same_kind", where=None):  # noqa: F811
    value = operand("copyto", src)
    cuda.submit(lambda: np.copyto(dst._values, value, casting=casting))


def get_default_memory_pool():
    return cuda.default_pool


def get_array_module(*arrays):
    return sys.modules[__name__] if next(sources(arrays), None) is not None else np


def __getattr__(name):
    if name == "RawModule":  # only who launches a kernel needs a compiler
        from fake_kernels import RawModule

        return RawModule
    raise AttributeError(f"module 'cupy' has no attribute {name!r}, or the fake one lacks it")
