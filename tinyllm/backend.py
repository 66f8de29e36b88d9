"""Which array library holds x, what a number may look like, and where randomness comes from.

The rest of the package never says `np.` or `cupy.` where an array may live on either: it asks `array_module(x)` and uses the
functions that both libraries share. One body of code then serves the CPU and the GPU.
"""
import sys
import zlib

import numpy as np

PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda")


def array_module(x):
    """The library that made x: numpy for its arrays and for Python numbers, else the package that defines x's type (cupy)."""
    if isinstance(x, np.ndarray | np.generic | int | float | complex | list | tuple):
        return np
    return sys.modules[type(x).__module__.partition(".")[0]]


def device_module(device: str):
    """The array library of a device, ready to use: numpy for "cpu", cupy for "cuda".

    Raises ValueError, in one line that says what is missing and how to get it, where CuPy or a GPU is absent.
    """
    if device == "cpu":
        return np
    if device != "cuda":
        raise ValueError(f"device {device!r} is unknown: use cpu or cuda")
    try:
        import cupy
    except ImportError as error:
        raise ValueError('--device cuda needs CuPy, which is not installed: pip install "tinyllm[cuda12]" (or cuda13)') from error
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ValueError(f"--device cuda found no usable GPU ({error}): check nvidia-smi, or use --device cpu") from error
    return cupy


def to_numpy(x) -> np.ndarray:
    """x as a NumPy array, copied from the GPU where it lives there."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def random_stream(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """An independent random stream for each (seed, purpose, step).

    Because the stream of step n does not depend on what was drawn before it, any step can be replayed alone, and a resumed run
    needs no stored generator. The purpose enters as its CRC-32, which, unlike hash(), is the same in every process.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), step])


def round_to_grid(x, precision: str):
    """The values of x rounded to the grid of a 16-bit format, still stored as float32.     (...) -> (...)

    fp16 has 5 exponent and 10 fraction bits, bf16 has 8 and 7. Both round to nearest, ties to even. NumPy knows fp16; a bf16 is
    the upper half of a float32, so rounding adds half a unit of that half's last place, and one less when that place is even:

        upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16

    A carry out of the fraction raises the exponent, which is what rounding up means there, up to infinity. NaN is left as it
    is, since a carry could turn it into an infinity. "fp32" returns x itself.
    """
    if precision == "fp32":
        return x
    xp = array_module(x)
    x = xp.asarray(x, dtype=xp.float32)
    if precision == "fp16":
        with np.errstate(over="ignore"):  # beyond 65504 the answer is infinity: loss scaling looks for it
            return x.astype(xp.float16).astype(xp.float32)
    if precision != "bf16":
        raise ValueError(f"precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
    bits = xp.ascontiguousarray(x).view(xp.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & xp.uint32(0xFFFF0000)
    return xp.where(xp.isnan(x), x, rounded.view(xp.float32)).reshape(x.shape)
