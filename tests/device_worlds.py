"""Where a test of the device runs: on the fake device in the CPU's memory, or on a real GPU, the same test.

    def test_something(world):                      # a fixture of conftest.py; `fake` is the fake device alone
        xp = world.xp                               # fake_cupy or cupy
        n = world.size(17, 4096)                    # small on the fake device, large on a GPU

What the fake device is made of:

    fake_cupy       the module: functions, kernels, strictness      fake_ndarray    its arrays
    fake_cuda       streams, graphs, memory, what waits             fake_kernels    RawModule on these arrays
    fake_cublaslt   the library of products (.py loads what .cpp is compiled to)
    cuda_on_cpu     RawModule on NumPy's arrays: compiles a kernel by g++ (.h: CUDA C's words for it) and starts it (.py) on a machine of
                    three parts: cuda_machine (threads, barriers), cuda_warps (shuffles, tensor cores), cuda_memory (bounds, races, traffic)
    nvrtc           NVIDIA's compiler alone: does a kernel compile, what does it take?

Tests of these themselves: test_fake_device, test_cuda_emulator, test_cuda_traffic. Of the library on a device: test_device_*, test_gpu. Of
kernels: test_cuda_*, test_cublaslt.
"""
import importlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cuda_on_cpu
import fake_cublaslt
import fake_cupy
import pytest

from tinyllm.backend import device_module
from tinyllm.kernels.cuda import cublaslt

WORLDS = (pytest.param("fake", marks=pytest.mark.cuda_on_cpu), pytest.param("gpu", marks=pytest.mark.gpu))


@dataclass(frozen=True)
class World:
    """xp : the device's array library.    name : "fake" or "gpu"."""

    name: str
    xp: ModuleType

    def size(self, small: Any, large: Any) -> Any:
        """One of two: what an emulator can do in a second, or what a GPU is made for."""
        return small if self.name == "fake" else large

    def forbidden(self) -> AbstractContextManager:
        """`with world.forbidden():` whatever makes the host wait for the device is an error."""
        return fake_cupy.forbidden() if self.name == "fake" else importlib.import_module("cupyx").allow_synchronize(False)


@contextmanager
def entered(name: str) -> Iterator[World]:
    """The world of this name; the fake one stands in for cupy inside the block. Skips the test where CuPy, a GPU or ml_dtypes is missing."""
    pytest.importorskip("ml_dtypes", reason="ml_dtypes, which gives NumPy bfloat16, is not installed")
    if name == "gpu":
        yield World(name, real_cupy())
        return
    if cuda_on_cpu.MISSING:
        pytest.skip(cuda_on_cpu.MISSING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", fake_cupy)
        patch.setattr(cublaslt, "library", fake_cublaslt.library)
        patch.setattr(cublaslt, "WORKSPACE", 2**16)  # for each stream of each test, and kept
        device_module("cuda")  # attaches the kernels
        yield World(name, fake_cupy)


def real_cupy() -> ModuleType:
    """CuPy, where it finds a GPU; skips the test otherwise, with the reason."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        pytest.skip("CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("CuPy finds no GPU")
    return device_module("cuda")
