"""A CUDA GPU: what it is, what it can do at most, and how to time what it does."""
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.backend import device_module, random_stream

PRODUCT = 8192  # rows and columns of the matrices that are multiplied: enough work for every multiprocessor, many times over
PRODUCTS_AT_ONCE = 10  # so that the host's waiting for them is little beside them
COPY_BYTES = 2**30  # what is copied at once to measure the memory: far more than a cache holds
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """name, compute capability, bytes in all and free.     driver : its own number, where known, and the newest CUDA that it can run.

    cupy : its version, and the CUDA that it was made for.      nvrtc, cublaslt : versions, or for the latter how to get it.
    complete : whether it is there.
    """

    name: str
    capability: str
    memory: int
    free: int
    driver: str
    cupy: str
    nvrtc: str
    cublaslt: str
    complete: bool

    def __str__(self):
        return f"{self.name}, driver {self.driver}, CuPy {self.cupy}, NVRTC {self.nvrtc}, cuBLASLt {self.cublaslt}"


def gpu_facts(xp=None) -> Gpu:
    """The current one. xp : its array library, if it is at hand. Raises ValueError, in one line, where there is none that can be used."""
    xp = xp or device_module("cuda")
    runtime = xp.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    free, total = runtime.memGetInfo()
    cublaslt, complete = _cublaslt_version()
    driver = f"{found} " if (found := driver_version()) else ""
    return Gpu(
        name=properties["name"].decode(), capability=f"{properties['major']}.{properties['minor']}", memory=total, free=free,
        driver=f"{driver}(CUDA {cuda_version(runtime.driverGetVersion())})",
        cupy=f"{xp.__version__} (CUDA {cuda_version(runtime.runtimeGetVersion())})",
        nvrtc="{}.{}".format(*xp.cuda.nvrtc.getVersion()), cublaslt=cublaslt, complete=complete,
    )  # fmt: skip


def gpu_is_present() -> bool:
    """Whether an NVIDIA driver is installed, usable or not."""
    return shutil.which("nvidia-smi") is not None or DRIVER.exists()


def driver_version(path: Path = DRIVER) -> str:
    """The driver's own number, such as 580.65.06; empty where the system does not tell."""
    found = re.search(r"(\d+\.\d+(\.\d+)?)", path.read_text(errors="replace")) if path.is_file() else None
    return found.group(1) if found else ""


def cuda_version(number: int) -> str:
    """13020 -> "13.2": CUDA's own way to write it."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _cublaslt_version() -> tuple[str, bool]:
    """cuBLASLt's version, or why there is none; and whether there is one."""
    from tinyllm.kernels.cuda import cublaslt

    try:
        return cuda_version_of_library(cublaslt.library().cublasLtGetVersion()), True
    except OSError as error:
        return f"not found ({' '.join(str(error).split())})", False


def cuda_version_of_library(number: int) -> str:
    """130002 -> "13.0.2": cuBLASLt's way to write its own."""
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


def product(size: int = PRODUCT, at_once: int = PRODUCTS_AT_ONCE) -> tuple[Callable[[], None], float]:
    """Products of two square bf16 matrices with sums in fp32, one after the other; and their operations."""
    from tinyllm.kernels.cuda.linear import times
    from tinyllm.kernels.cuda.storage import dtype_of

    xp = device_module("cuda")
    random = random_stream(0, "bench")  # numbers, not zeros: a chip takes less power, and so runs faster, where nothing changes
    a, b = (xp.asarray(random.standard_normal((size, size), dtype=np.float32)).astype(dtype_of("bf16")) for _ in range(2))
    c = xp.empty_like(a)

    def work():
        for _ in range(at_once):
            times(a, b, out=c)

    return work, 2.0 * size**3 * at_once


def copying(size: int = COPY_BYTES) -> tuple[Callable[[], None], float]:
    """A copy of an array; and the bytes that are read and written."""
    xp = device_module("cuda")
    x = xp.ones(size, dtype=xp.uint8)
    y = xp.empty_like(x)
    return lambda: xp.copyto(y, x), 2.0 * size


def wait_for_gpu() -> None:
    """Return when all that was asked of the GPU is done."""
    device_module("cuda").cuda.Device().synchronize()


def pool_mb() -> float:
    """What CuPy has taken of the GPU's memory for arrays so far, in MB; it keeps what they no longer need, so that this is the peak."""
    return device_module("cuda").get_default_memory_pool().total_bytes() / 1e6
