"""CUDA C compiled when it is first needed, by NVRTC through CuPy, and launched.

Each .cu file beside this one is compiled on its own, without any header of CUDA's: `prelude.cuh`, which is put in front, has the few
things that all of them need. What differs between variants (the number format, a head's width) are macros, so that the compiler knows
it. CuPy keeps what is compiled on disk.
"""
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
FORMATS = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}  # by name of the dtype: values of the macro FORMAT
OPTIONS = ("--std=c++17", "--restrict")


def source(file: str) -> str:
    """The CUDA C of FILE.cu as it is compiled: the prelude, then the file, with those beside it that it includes in their places.

    What is not ASCII (in comments alone) is replaced: CuPy writes the source to a file in the locale's encoding, which may not have it.
    """
    whole = '#include "prelude.cuh"\n' + _text(f"{file}.cu")
    return re.sub(r'^#include "(\w+\.cuh)"$', lambda line: _text(line[1]), whole, flags=re.MULTILINE)


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8").encode("ascii", "replace").decode()


def definitions(macros: dict) -> tuple[str, ...]:
    """Compiler options for these macros."""
    return tuple(f"-D{name}={value}" for name, value in sorted(macros.items()))


@functools.cache
def function(xp, file: str, name: str, shared: int = 0, **macros):
    """The kernel `name` of FILE.cu, compiled with these macros for the current GPU. shared : bytes of dynamic shared memory it is to get."""
    compiled = _module(xp, file, **macros).get_function(name)
    if shared > compiled.max_dynamic_shared_size_bytes:  # at first 48 KB less the kernel's own arrays; another launch may have asked for more
        compiled.max_dynamic_shared_size_bytes = shared
    return compiled


@functools.cache
def _module(xp, file: str, **macros):
    return xp.RawModule(code=source(file), options=(*OPTIONS, *definitions(macros)), backend="nvrtc")


def launch(xp, file: str, name: str, grid: Sequence[int], block: int, *arguments, shared: int = 0, **macros) -> None:
    """Start a kernel on the current stream, and return without waiting for it.

    grid : blocks along x (y, z).    block : threads in each.    shared : bytes of dynamic shared memory.
    arguments : arrays are passed as pointers to their first element (strides are the caller's business), None as a null pointer, Python
    ints as int, floats as float; NumPy scalars keep their type.
    """
    function(xp, file, name, shared, **macros)(tuple(grid), (block,), tuple(map(_argument, arguments)), shared_mem=shared)


def _argument(x):
    if x is None:
        return np.uintp(0)
    if isinstance(x, np.generic):  # before the rest: NumPy's float64 is a Python float, too
        return x
    if isinstance(x, bool | int):
        return np.int32(x)
    return np.float32(x) if isinstance(x, float) else x


def format_of(x) -> str:
    """The format of an array's numbers, as the macro FORMAT has it."""
    return FORMATS[x.dtype.name]
