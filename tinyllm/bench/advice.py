"""What to change about a machine or an installation so that tinyllm runs as fast as it can there."""
from collections.abc import Callable

from tinyllm.backend import HOW_TO_GET_CUPY
from tinyllm.bench.gpu import Gpu
from tinyllm.bench.machine import Facts

KNOWN_BLAS = ("openblas", "mkl", "accelerate")
WIDE = ("AVX2", "AVX512F", "X86_V3", "X86_V4")  # NumPy's names, older and newer
LITTLE = 2**30


def advice(facts: Facts) -> list[str]:
    """A sentence for each thing that could be better, the costliest first; none where all is well."""
    return [said for rule in RULES if (said := rule(facts)) is not None]


def blas_is_slow(f: Facts) -> str | None:
    if not any(name in f.blas.lower() for name in KNOWN_BLAS):
        return (f"NumPy multiplies with {f.blas}, which is no fast library: take NumPy's own wheel "
                "(pip install --force-reinstall --only-binary :all: numpy)")  # fmt: skip
    return None


def blas_is_unknown(f: Facts) -> str | None:
    if not blas_is_slow(f) and "openblas" not in f.blas.lower() and f.usable > 1:
        return (f"tinyllm cannot set the threads of {f.blas}, which then compete with its own: take NumPy's own wheel, "
                "or set that library's number of threads to 1")  # fmt: skip
    return None


def no_wide_vectors(f: Facts) -> str | None:
    if f.architecture.lower() in ("x86_64", "amd64") and not set(WIDE) & set(f.vectors):
        return ("no AVX2: on a virtual machine let the host's CPU through (for example -cpu host); "
                "on a Mac with Apple's chip take a Python for arm64; a CPU from before 2013 is slow at this")  # fmt: skip
    return None


def kernels_are_gone(f: Facts) -> str | None:
    return None if f.kernels else "tinyllm/kernels is not there, so every op runs by its plain definition: put the folder back"


def cores_are_withheld(f: Facts) -> str | None:
    if f.usable < f.affinity:
        return f"the control group allows {f.usable} of {f.affinity} cores: raise its CPU limit (for a container: --cpus)"
    if f.affinity < f.cores:
        return (f"this process may use {f.affinity} of {f.cores} cores: start it without taskset, or with more cores "
                "(for a container: --cpuset-cpus)")  # fmt: skip
    return None


def threads_are_set(f: Facts) -> str | None:
    if f.variables and f.blas_threads < f.usable:
        names = ", ".join(f"{name}={value}" for name, value in f.variables.items())
        return (f"{names}: NumPy's own products get {f.blas_threads} of {f.usable} cores: unset it "
                "(tinyllm's --threads says how many it takes)")  # fmt: skip
    return None


def memory_is_short(f: Facts) -> str | None:
    if f.free is not None and f.free < LITTLE:
        return (f"{f.free / 2**20:,.0f} MiB of memory are free: close programs, or train smaller models "
                "(tinyllm describe says what one takes)")  # fmt: skip
    return None


def others_use_the_cores(f: Facts) -> str | None:
    if f.load is not None and f.load > 0.5 * f.usable:
        return f"other programs keep {f.load:.1f} of {f.usable} cores busy (the last minute's load): what is timed now comes out too slow"
    return None


def cores_add_little(f: Facts) -> str | None:
    if f.usable > 1 and f.products < 0.6 * f.usable * f.products_one:
        gain = f.products / f.products_one
        return (f"{f.usable} threads multiply only {gain:.1f} times as fast as one: "
                "the cores are shared with others, or two threads of one core; try --threads with less")  # fmt: skip
    return None


def gpu_lacks_a_library(f: Facts) -> str | None:
    if isinstance(f.gpu, Gpu) and not f.gpu.complete:
        return f"the GPU cannot be used without cuBLASLt: {HOW_TO_GET_CUPY}"
    return None


def gpu_is_idle(f: Facts) -> str | None:
    return "a GPU is there but not used: the line gpu says why, and what to do" if f.gpu_unused else None


RULES: tuple[Callable[[Facts], str | None], ...] = (
    blas_is_slow, blas_is_unknown, no_wide_vectors, kernels_are_gone, cores_are_withheld, threads_are_set, memory_is_short,
    others_use_the_cores, cores_add_little, gpu_is_idle, gpu_lacks_a_library,
)  # fmt: skip
