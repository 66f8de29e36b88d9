"""What this machine is, as far as it matters for speed, and what it can do: products per second and bytes read per second."""
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

import tinyllm
from tinyllm.bench.gpu import Gpu, gpu_facts, gpu_is_present
from tinyllm.threads import available_cores, parallel, single_threaded_blas, threads

PEERS = ("torch", "transformers", "tokenizers", "tiktoken")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")
PRODUCT = 1536  # rows and columns of the matrices that are multiplied: far beyond every cache line effect, 30 MB in all
READ_BYTES = 2**28  # what is read at once to measure the memory: more than most last-level caches hold


@dataclass(frozen=True)
class Facts:
    """cores : of the machine; affinity : those this process may be put on; usable : after the control group's quota too.

    blas : its name and version; blas_threads : how many it uses by itself.     vectors : instruction sets that NumPy found.
    memory, free : bytes, a control group's limit counted; None where the system does not say.
    gpu : the one that can be used, or why there is none; gpu_unused : whether there is one all the same.
    load : processes that ran in the last minute.
    variables : settings of threads that were found.     products, products_one : operations per second on all threads and on one.
    reading : bytes per second on all threads.
    """

    python: str
    numpy: str
    system: str
    cpu: str
    architecture: str
    vectors: tuple[str, ...]
    cores: int
    affinity: int
    usable: int
    blas: str
    blas_threads: int
    memory: int | None
    free: int | None
    load: float | None
    gpu: Gpu | str
    gpu_unused: bool
    kernels: bool
    peers: dict[str, str]
    variables: dict[str, str]
    products: float
    products_one: float
    reading: float


def facts(seconds: float = 0.6) -> Facts:
    """All of them. seconds : for each of the three measurements."""
    build = np.show_config(mode="dicts")
    vectors, blas = build["SIMD Extensions"], build["Build Dependencies"]["blas"]
    total, free = memory()
    gpu, gpu_unused = graphics()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before the measurements add to it
    products, products_one, reading = rates(seconds)
    return Facts(
        python=f"{platform.python_implementation()} {platform.python_version()}", numpy=np.__version__,
        system=f"{platform.system()} {platform.release()}", cpu=cpu_name(), architecture=platform.machine(),
        vectors=(*vectors.get("baseline", ()), *vectors.get("found", ())),
        cores=os.cpu_count() or 1, affinity=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        usable=available_cores(), blas=f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(), blas_threads=blas_threads(),
        memory=total, free=free, load=load, gpu=gpu, gpu_unused=gpu_unused,
        kernels=Path(tinyllm.__file__).with_name("kernels").is_dir(), peers=installed(PEERS),
        variables={name: value for name in THREAD_VARIABLES if (value := os.getenv(name)) is not None},
        products=products, products_one=products_one, reading=reading,
    )  # fmt: skip


def installed(packages) -> dict[str, str]:
    """Those of the packages that are installed, with their versions; none is imported."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    return platform.processor() or "unknown"


def memory(group: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int | None]:
    """Bytes in all and bytes free for a new program, the smaller of the machine's and those of the control group in that folder.

    The system takes pages back that only cache files not used of late (inactive_file) before it lets a group run out of memory.
    """
    info = Path("/proc/meminfo")
    if not info.is_file():
        known = getattr(os, "sysconf_names", {})
        return (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in known else None), None
    lines = dict(line.split(":") for line in info.read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(kept["inactive_file"])
        total, free = min(total, int(limit)), min(free, int(limit) - used)
    return total, free


def graphics() -> tuple[Gpu | str, bool]:
    """The GPU, or why there is none to be used; and whether one lies idle."""
    try:
        return gpu_facts(), False
    except ValueError as error:
        return ("an NVIDIA driver, but " if gpu_is_present() else "none: ") + str(error), gpu_is_present()


def blas_threads() -> int:
    """Threads that NumPy's BLAS uses by itself; 1 where it cannot be asked."""
    guard = single_threaded_blas()
    with guard:
        return guard.before


def rates(seconds: float) -> tuple[float, float, float]:
    """Products on all threads and on one (operations per second), and reading on all threads (bytes per second)."""
    before = threads()
    try:
        all_threads = rate(*product(), seconds)
        reading_rate = rate(*reading(), seconds)
        threads(1)
        with single_threaded_blas():  # with one thread of ours, its own would help
            return all_threads, rate(*product(), seconds), reading_rate
    finally:
        threads(before)


def rate(work: Callable[[], None], amount: float, seconds: float) -> float:
    """amount per second of work(), the median of as many runs as fit into the time, after one that does not count."""
    work()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return amount / statistics.median(times)


def product(size: int = PRODUCT) -> tuple[Callable[[], None], float]:
    """A product of two square fp32 matrices, its rows shared out over tinyllm's threads; and its operations."""
    random = np.random.default_rng(0)
    a, b = random.random((2, size, size), dtype=np.float32)
    c = np.empty_like(a)
    return lambda: parallel(lambda part, _: np.matmul(a[part], b, out=c[part]), size), 2.0 * size**3


def reading(size: int = READ_BYTES) -> tuple[Callable[[], None], float]:
    """A matrix times a vector, as decoding one text does it: every weight is read once; and the bytes of the matrix."""
    w = np.ones((size // 4096, 1024), dtype=np.float32)
    x, y = np.ones(1024, dtype=np.float32), np.empty(size // 4096, dtype=np.float32)
    return lambda: parallel(lambda part, _: np.matmul(w[part], x, out=y[part]), len(w)), float(w.nbytes)
