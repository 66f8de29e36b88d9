"""Which array library holds x, what a number may look like, and where randomness comes from.

The rest of the package never says `np.` or `cupy.` where an array may live on either: it asks `array_module(x)` and uses the
functions that both libraries share. One body of code then serves the CPU and the GPU.
"""
import sys
import zlib
from collections.abc import Callable

import numpy as np

PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda")
HOW_TO_GET_CUPY = 'pip install "cupy-cuda13x[ctk]" ml_dtypes (cupy-cuda12x where nvidia-smi shows CUDA 12)'
OLDEST = 80  # compute capability times ten: the first with tensor cores for bf16 and asynchronous copies, which kernels are made of
_preparations: list[Callable[[], None]] = []
_deterministic = False


def when_device_is_used(prepare: Callable[[], None]) -> Callable[[], None]:
    """A decorator: the function is called whenever a device is asked for, so that what only a GPU needs is loaded only then."""
    _preparations.append(prepare)
    return prepare


def deterministic(flag: bool | None = None) -> bool:
    """Whether a GPU shall give bitwise the same results in every run, where that costs speed; with `flag`, set it first. Default: no.

    It is one setting of the process. The CPU's results are the same in every run in any case.
    """
    global _deterministic
    if flag is not None:
        _deterministic = flag
    return _deterministic


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
    except ModuleNotFoundError as error:
        raise ValueError(f"--device cuda needs CuPy, which is not installed: {HOW_TO_GET_CUPY}") from error
    except ImportError as error:
        raise ValueError(f"--device cuda: CuPy cannot be loaded ({error}): uninstall it, then {HOW_TO_GET_CUPY}") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ValueError(f"--device cuda found no usable GPU: {_what_is_wrong(cupy.cuda.runtime, error)}, or use --device cpu") from error
    if not count:
        raise ValueError("--device cuda found no GPU that this process may use: see nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
    try:
        cupy.cuda.nvrtc.getVersion()
    except (RuntimeError, OSError) as error:  # CuPy loads it when it first compiles something, which is not the time to tell
        said = " ".join(str(error).split())
        raise ValueError(f"--device cuda needs NVRTC, which compiles kernels ({said}): {HOW_TO_GET_CUPY}") from error
    if int(capability := cupy.cuda.Device().compute_capability) < OLDEST:
        raise ValueError(
            f"--device cuda needs a GPU of compute capability {OLDEST / 10} or newer (A100, RTX 30, ...), and this one's is {int(capability) / 10}: "
            "use --device cpu, or choose another by CUDA_VISIBLE_DEVICES"
        )
    for prepare in _preparations:
        prepare()
    return cupy


def _what_is_wrong(runtime, error: Exception) -> str:
    """Why no GPU was found, and what to do. A driver runs what was made for its own major version of CUDA and for older ones."""
    driver, made_for = runtime.driverGetVersion() // 1000, runtime.runtimeGetVersion() // 1000
    if not driver:
        return "no NVIDIA driver is installed: install one (nvidia-smi then shows it)"
    if driver < made_for:
        return (f"the NVIDIA driver is for CUDA {driver}, but CuPy was made for CUDA {made_for}: update the driver, or take the CuPy for it "
                f"(pip uninstall cupy-cuda{made_for}x; pip install \"cupy-cuda{driver}x[ctk]\")")  # fmt: skip
    return f"{error}: see nvidia-smi"


def to_numpy(x) -> np.ndarray:
    """x as a NumPy array, copied from the GPU where it lives there."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def on_host(x) -> bool:
    """Whether x lives in the CPU's memory, where a look at its values costs nothing."""
    return isinstance(x, np.ndarray | np.generic)


def is_half(x) -> bool:
    """Whether x is an array of a 16-bit floating-point format: fp16, or ml_dtypes' bf16, whose kind NumPy calls V."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and dtype.itemsize == 2 and dtype.kind in "fV"


def is_floating(x) -> bool:
    """Whether x is an array of floating-point numbers."""
    return is_half(x) or getattr(getattr(x, "dtype", None), "kind", "") == "f"


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
