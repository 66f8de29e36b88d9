"""fp16 and bf16 as formats of storage: every op takes them, computes in fp32, and stores its result in the same format.

On the CPU a 16-bit value is an fp32 number on a grid. Here it is 16 bits in memory: `ops.cast` really converts, so whatever nn/ marks as
`stored` becomes a 16-bit array, and all that is made of it follows. For ops that have no kernel for such arrays the rule is

    y = narrow(op(wide(x), …))          dx = backward(wide(dy))

with `wide` the exact conversion to fp32 and `narrow` the rounding to the format; gradients are rounded by the engine, which hands each
input one in its own format. Three kinds of ops differ:

    reductions, losses, probabilities    give fp32: what is summed over many elements needs the digits
    what moves numbers (ops.shape)       is left as it is: nothing is computed, and views stay views
    +, -, · of two arrays of one format  likewise: the array library rounds the fp32 result itself, so one pass does it

A kernel that is attached later is asked before this.
"""
from collections.abc import Callable

import numpy as np

from tinyllm import ops
from tinyllm.backend import is_half
from tinyllm.kernels import attach
from tinyllm.tensor import OPS

FORMATS = {"fp16": "float16", "bf16": "bfloat16"}  # dtypes by precision
STAY_FP32 = ("reduce", "cross_entropy", "losses", "preference", "policy", "softmax")  # modules of ops
MOVE = ("reshape", "transpose", "swapaxes", "expand", "concatenate", "stack", "pad")  # and getitem, but for arrays of indices
ONE_OPERATION = ("add", "sub", "mul", "neg")


def dtype_of(precision: str) -> np.dtype:
    """The dtype in which a device stores a precision. ValueError where bf16 lacks its library."""
    try:
        return np.dtype(FORMATS.get(precision, "float32"))
    except TypeError as error:  # NumPy learns of bfloat16 from ml_dtypes, which CuPy imports where it is installed
        raise ValueError("bf16 on a GPU needs ml_dtypes, which is not installed: pip install ml_dtypes") from error


def wide(x):
    """A 16-bit array as fp32; anything else as it is."""
    return x.astype(np.float32) if is_half(x) else x


def widened(op: Callable) -> Callable:
    """The twin of an op for arrays of which at least one is of a 16-bit format."""
    stays = op.__module__.rpartition(".")[2] in STAY_FP32

    def kernel(*arrays, **settings):
        halves = [x.dtype for x in arrays if is_half(x)]
        if not halves or _left_alone(op.__name__, arrays, halves, settings):
            return NotImplemented
        y, backward = op.array(*map(wide, arrays), **settings)
        return (y if stays else y.astype(halves[0])), lambda dy: backward(wide(dy))

    return kernel


def _left_alone(name: str, arrays: tuple, halves: list, settings: dict) -> bool:
    """Whether the op itself does it: nothing is computed, or one operation on arrays of one format."""
    if name == "getitem":
        index = settings["index"]
        return not any(hasattr(i, "dtype") or isinstance(i, list) for i in (index if isinstance(index, tuple) else (index,)))
    return name in MOVE or (name in ONE_OPERATION and len(halves) == len(arrays) and len(set(halves)) == 1)


def cast(x, *, precision):
    """ops.cast on a device: x in the format itself, x as it is where it has it.   dx = dy, which the engine has in that format by then."""
    if precision in FORMATS:
        return x.astype(dtype_of(precision), copy=False), lambda dy: dy
    return (wide(x), lambda dy: dy) if precision == "fp32" else NotImplemented


for _op in OPS.values():
    attach(_op, "cuda")(widened(_op))
attach(ops.cast, "cuda")(cast)
