"""fake_cublaslt.cpp, compiled and loaded: what `cublaslt.library()` returns on the fake device."""
import ctypes
import functools
from collections import Counter
from pathlib import Path

import fake_cuda
from cuda_on_cpu import cached, compiler_version, run_compiler

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
INTERNAL_ERROR = 14


class FakeLibrary:
    """The library's functions. Products asked for while a stream captures are noted for its graph, as work on the device is."""

    def __init__(self, path):
        self._functions, self.calls = ctypes.CDLL(str(path)), Counter()

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self._functions, name)

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments) -> int:  # noqa: N802
        self.calls["heuristic"] += 1
        return INTERNAL_ERROR if fake_cuda.capturing() else self._functions.cublasLtMatmulAlgoGetHeuristic(*arguments)

    def cublasLtMatmul(self, *arguments) -> int:  # noqa: N802
        self.calls["matmul"] += 1
        if not fake_cuda.capturing():
            return self._functions.cublasLtMatmul(*arguments)
        product = ctypes.c_void_p()  # lives as long as the process, since nobody says when a graph is gone
        status = self._functions.fake_capture(*arguments, ctypes.byref(product))
        if status == 0:
            fake_cuda.submit(lambda: self._functions.fake_run(product))
        return status


@functools.cache
def library() -> FakeLibrary:
    """The fake library, compiled once by g++ and kept beside the emulator's kernels."""
    inputs = (SOURCE.read_text(encoding="utf-8"), *OPTIONS, compiler_version())
    return FakeLibrary(cached("cublaslt.so", inputs, lambda path: run_compiler(*OPTIONS, SOURCE, "-o", path)))
