"""CUDA kernels on the CPU: CuPy's RawModule, compiled by g++ against cuda_on_cpu.h and run by the machine of cuda_machine.cpp.

    module = cuda_on_cpu.RawModule(code=launch.source("norms"), options=("-DFORMAT=BF16",), backend="nvrtc")
    module.get_function("rms_norm")((rows,), (128,), (x, w, y, np.int32(width)), shared_mem=0)

Arguments are NumPy arrays (pointers to their first element), NumPy scalars of exactly the parameter's type, or np.uintp(0), a null
pointer. A kernel may touch the whole buffer behind each array that it got (that of its `.base`), and nothing else.

A launch raises CudaError, with the lines of the source, where a thread reads or writes outside of these buffers or at an address that
its size does not divide, where two threads race (the message has both accesses), and where threads wait for each other for ever. Shared
memory holds NaN at first, asynchronous copies arrive as late as they may, and warps, lanes and blocks run in random order:

    with cuda_on_cpu.order(7): ...                               # another order for the launches in here
    y = cuda_on_cpu.in_every_order(lambda: norm(x, w))           # several; an error unless all results are bitwise equal

What a kernel would cost on a GPU, as far as it can be counted: sectors of global memory, bank conflicts in shared memory, line by line:

    print(cuda_on_cpu.traffic(lambda: norm(x, w)))

Not modelled: time, caches, registers (tests/nvrtc.py prints these), wgmma and TMA, blocks larger than one dimension. Dynamic
shared memory comes through the prelude's DYNAMIC_SHARED inside a function, static __shared__ arrays stand in kernels themselves.
"""
import contextlib
import ctypes
import functools
import getpass
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
HEADERS, PARTS = ("cuda_on_cpu.h", "cuda_machine.h"), ("cuda_machine.cpp", "cuda_warps.cpp", "cuda_memory.cpp")
MACHINE = ("-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-std=c++17")
KERNELS = ("-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-std=c++17", "-fno-strict-aliasing", "-ffp-contract=off",
           "-fno-tree-sra", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-Wno-attributes", "-Wno-unknown-pragmas")
IGNORED_OPTIONS = ("--std=", "-std=", "--restrict", "--use_fast_math", "-lineinfo", "--maxrregcount")      # of NVRTC: no difference here
SMALL_SHARED, LARGE_SHARED = 48 * 1024, 227 * 1024      # bytes a block gets without asking, and at most (compute capability 9.0)
MISSING = None if shutil.which("g++") else "g++, which compiles CUDA kernels for the CPU, is missing: install it (Debian: apt install g++)"

# What an array may be for a pointer to each C++ type, and what a NumPy scalar must be for a parameter of it.
POINTERS = {"float": {"float32"}, "double": {"float64"}, "int": {"int32"}, "unsigned": {"uint32"}, "long long": {"int64"},
            "unsigned long long": {"uint64"}, "unsigned short": {"float16", "bfloat16", "uint16"}, "short": {"int16"},
            "unsigned char": {"uint8", "bool"}, "signed char": {"int8"}, "char": {"int8", "uint8"}, "bool": {"bool"}}
SCALARS = {"float": "float32", "double": "float64", "int": "int32", "unsigned": "uint32", "long long": "int64",
           "unsigned long long": "uint64", "bool": "bool", "short": "int16", "unsigned short": "uint16"}
HALF_FORMATS = {"1": "float16", "FP16": "float16", "2": "bfloat16", "BF16": "bfloat16"}

KINDS = ("read", "write", "atomic", "asynchronous copy", "ldmatrix")      # as cuda_machine.h counts them
MOST_LINES = 1000      # of a traffic report: as many as a kernel has places that touch memory, and more

_order = threading.local()      # .seed and .traffic of the launches to come


class CudaError(RuntimeError):
    """A launch that a GPU would refuse, or on which nobody could rely."""


@contextlib.contextmanager
def order(seed: int) -> Iterator[None]:
    """Blocks, warps and lanes of the launches in here run in the random order that `seed` chooses."""
    before = getattr(_order, "seed", 0)
    _order.seed = seed
    try:
        yield
    finally:
        _order.seed = before


def in_every_order(run: Callable, seeds: Sequence[int] = (1, 2, 3)):
    """run() in several orders: its result (an array or a tuple of them, or None), if all are the same to the bit. Raises AssertionError."""
    results = []
    for seed in seeds:
        with order(seed):
            results.append(run())
    for seed, result in zip(seeds[1:], results[1:], strict=True):
        for i, (first, other) in enumerate(zip(_arrays(results[0]), _arrays(result), strict=True)):
            assert first.tobytes() == other.tobytes(), f"result {i} depends on the order of threads: seed {seeds[0]} and seed {seed} differ"
    return results[0]


@dataclass(frozen=True)
class Line:
    """What the accesses of one line of a kernel cost.

    requests : by how many instructions of a warp.    units : sectors of 32 bytes of global memory, or passes over the banks of shared
    memory.    ideal : the fewest units that bring as many different bytes.
    """
    kernel: str
    where: str
    what: str
    memory: str
    requests: int
    units: int
    ideal: int


@dataclass
class Traffic:
    """What some launches moved. read, written : bytes of global memory, in whole sectors, each counted once a launch."""
    lines: list[Line] = field(default_factory=list)
    read: int = 0
    written: int = 0

    def add(self, new: Line) -> None:
        """Add to the counts of the same line: a compiler may have made several places in the code of it, unrolling a loop for one."""
        for i, old in enumerate(self.lines):
            if (old.kernel, old.where, old.what, old.memory) == (new.kernel, new.where, new.what, new.memory):
                self.lines[i] = replace(old, requests=old.requests + new.requests, units=old.units + new.units, ideal=old.ideal + new.ideal)
                return
        self.lines.append(new)

    def beyond_ideal(self, memory: str) -> int:
        """Units more than the fewest possible, of "global" or "shared" memory: there, bank conflicts."""
        return sum(line.units - line.ideal for line in self.lines if line.memory == memory)

    def __str__(self) -> str:
        lines = [f"{line.kernel}: {line.memory:6} {line.what:17} {line.requests:7,} requests {line.units:8,} units, ideally {line.ideal:8,}"
                 f"   {line.where}" for line in self.lines]
        return "\n".join([*lines, f"read {self.read:,} bytes, written {self.written:,} bytes of global memory"])


def traffic(run: Callable) -> Traffic:
    """What the launches in run() move. Several times slower than without."""
    before = getattr(_order, "traffic", None)
    _order.traffic = Traffic()
    try:
        run()
        return _order.traffic
    finally:
        _order.traffic = before


def _arrays(result) -> list:
    parts = result if isinstance(result, tuple | list) else [result]
    return [np.array(part) for part in parts if part is not None]      # a copy: runs may share their output


class Function:
    """A kernel: function(grid, block, arguments, shared_mem=0), as CuPy's."""

    def __init__(self, module: "RawModule", name: str):
        library = module._library
        if not hasattr(library, f"call_{name}"):
            raise CudaError(f"no kernel {name!r} in this module (`extern \"C\" __global__ void {name}(...)`)")
        self.module, self.name = module, name
        self.parameters: list[tuple[bool, bool, str]] = []      # for each: a pointer? to const? the type's name
        word = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(
            lambda kind, type_name: self.parameters.append((b"*" in kind, b"const" in kind, type_name.decode())))
        getattr(library, f"describe_{name}")(word)
        self.bounds = ctypes.c_int.in_dll(library, f"bounds_{name}").value      # of __launch_bounds__; 0 without
        self.static_shared = library.machine_static_shared()      # of all kernels of the module: no more than that is known
        self.max_dynamic_shared_size_bytes = SMALL_SHARED - self.static_shared
        format = next((option.partition("=")[2] for option in module.options if option.startswith("-DFORMAT=")), None)
        self.half_format = HALF_FORMATS.get(format)

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence, *, shared_mem: int = 0, stream=None) -> None:
        grid, threads = self._shape(tuple(grid), tuple(block), shared_mem)
        if len(args) != len(self.parameters):
            raise CudaError(f"{self.name}: {len(self.parameters)} parameters, {len(args)} arguments")
        values = [self._argument(i, self.values(x)) for i, x in enumerate(args)]
        if self.module.restrict:
            self._check_apart(args)
        pointers = (ctypes.c_void_p * max(len(values), 1))(*[ctypes.addressof(value) for value in values])
        buffers = sorted({_extent(self.owner(x)) for x in args if isinstance(self.values(x), np.ndarray) and x.size})
        flat = (ctypes.c_size_t * max(2 * len(buffers), 1))(*[number for buffer in buffers for number in buffer])
        library, sums = self.module._library, getattr(_order, "traffic", None)
        library.machine_launch.restype = ctypes.c_char_p
        kernel = ctypes.cast(getattr(library, f"call_{self.name}"), ctypes.c_void_p)
        seed = getattr(_order, "seed", 0)
        error = library.machine_launch(kernel, pointers, (ctypes.c_uint * 3)(*grid), ctypes.c_uint(threads), ctypes.c_uint(shared_mem), flat,
                                       ctypes.c_uint(len(buffers)), ctypes.c_uint64(seed), ctypes.c_int(sums is not None))
        if error:
            raise CudaError(f"{self.name}: {self.module.explain(error.decode())}")
        if sums is not None:
            self._add_traffic(sums)

    def _check_apart(self, args: Sequence) -> None:
        """--restrict is a promise: what is reached through one pointer, and written through any, is reached through no other."""
        first = {}      # parameter by address
        for i, x in enumerate(self.values(x) for x in args):
            if isinstance(x, np.ndarray) and x.size:
                other = first.setdefault(x.ctypes.data, i)
                if other != i and not (self.parameters[i][1] and self.parameters[other][1]):
                    raise CudaError(f"{self.name}: parameters {other + 1} and {i + 1} are the same memory, which --restrict rules out")

    def _add_traffic(self, sums: Traffic) -> None:
        table, moved = (ctypes.c_uint64 * (6 * MOST_LINES))(), (ctypes.c_uint64 * 2)()
        count = self.module._library.machine_traffic(table, ctypes.c_uint(MOST_LINES), moved)
        for place, kind, is_global, *counts in np.array(table[:6 * count], dtype=np.int64).reshape(-1, 6).tolist():
            sums.add(Line(self.name, self.module.line(place), KINDS[kind], "global" if is_global else "shared", *counts))
        sums.read += moved[0]
        sums.written += moved[1]

    @staticmethod
    def values(x):
        """An argument's values: it itself, where it is a NumPy array or scalar."""
        return x

    @staticmethod
    def owner(x) -> np.ndarray:
        """The array whose memory x is a view of: what a kernel that gets x may touch."""
        while isinstance(x.base, np.ndarray):
            x = x.base
        return x

    def _shape(self, grid: tuple[int, ...], block: tuple[int, ...], shared_mem: int) -> tuple[tuple[int, ...], int]:
        grid = grid + (1,) * (3 - len(grid))
        if len(grid) != 3 or min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise CudaError(f"{self.name}: a grid of {grid} blocks: from 1 to 2³¹-1 along x, to 65535 along y and z")
        threads = block[0]
        if set(block[1:]) - {1} or not 1 <= threads <= (self.bounds or 1024):
            raise CudaError(f"{self.name}: a block of {block} threads: one dimension, from 1 to {self.bounds or 1024}")
        if self.max_dynamic_shared_size_bytes + self.static_shared > LARGE_SHARED:
            raise CudaError(f"{self.name}: asks for {self.max_dynamic_shared_size_bytes} + {self.static_shared} bytes of shared memory; "
                            f"a block gets {LARGE_SHARED}")
        if not 0 <= shared_mem <= self.max_dynamic_shared_size_bytes:
            raise CudaError(f"{self.name}: {shared_mem} bytes of dynamic shared memory, where max_dynamic_shared_size_bytes is "
                            f"{self.max_dynamic_shared_size_bytes}")
        return grid, threads

    def _argument(self, i: int, x):
        pointer, const, name = self.parameters[i]
        what = f"{self.name}: parameter {i + 1} is {'const ' * const}{name}{'*' * pointer}"
        if not pointer:
            if not isinstance(x, np.generic) or x.dtype.name != SCALARS.get(name):
                raise CudaError(f"{what}, the argument {_named(x)}")
            return (ctypes.c_char * x.nbytes).from_buffer_copy(x.tobytes())
        if isinstance(x, np.uintp):
            if x:
                raise CudaError(f"{what}, the argument an address: pass the array itself, so that the emulator knows its bounds")
            return ctypes.c_void_p(0)
        if not isinstance(x, np.ndarray) or (name in POINTERS and x.dtype.name not in POINTERS[name]):
            raise CudaError(f"{what}, the argument {_named(x)}")
        if name == "unsigned short" and x.dtype.name != "uint16" and self.half_format and x.dtype.name != self.half_format:
            raise CudaError(f"{what} of {self.half_format} numbers, the argument {_named(x)}")
        if not const and not x.flags.writeable:
            raise CudaError(f"{what}, the argument a read-only array")
        return ctypes.c_void_p(x.ctypes.data)


class RawModule:
    """CuPy's RawModule for source text: compiled when a kernel is first asked for."""

    function = Function

    def __init__(self, code: str, *, options: tuple[str, ...] = (), backend: str = "nvrtc"):
        if not isinstance(options, tuple):
            raise TypeError("options: a tuple of strings, as CuPy has it")
        if backend != "nvrtc":
            raise ValueError(f"backend {backend!r}: kernels here are compiled by NVRTC")
        unknown = [option for option in options if not option.startswith(("-D", *IGNORED_OPTIONS))]
        if unknown:
            raise ValueError(f"the emulator does not know the compiler options {unknown}")
        self.restrict = "--restrict" in options
        self.code, self.options = code, tuple(option for option in options if option.startswith("-D"))

    def compile(self) -> None:
        self._library  # noqa: B018 - compiles

    def get_function(self, name: str) -> Function:
        return self.function(self, name)

    @functools.cached_property
    def _library(self) -> ctypes.PyDLL:
        return ctypes.PyDLL(str(_compiled(self.code, self.options)))

    def explain(self, message: str) -> str:
        """An error message with places in the code looked up: {1a2b} -> the source's lines."""
        return re.sub(r"\{([0-9a-f]+)\}", lambda match: self.line(int(match[1], 16)), message)

    @functools.lru_cache(maxsize=MOST_LINES)  # noqa: B019 - modules live as long as the tests
    def line(self, place: int) -> str:
        """The line of the source that was compiled to this place, and those that it was inlined into."""
        command = ["addr2line", "-i", "-e", self._library._name, hex(max(place - 1, 0))]      # -1: a call returns behind itself
        found = subprocess.run(command, capture_output=True, text=True).stdout
        numbers = [int(n) for n in re.findall(r"\.cu:(\d+)", found)]
        source = self.code.splitlines()
        return ", called from ".join(f"line {n} `{source[n - 1].strip()}`" for n in numbers) or "an unknown line"


def _named(x) -> str:
    return f"an array of {x.dtype.name}" if isinstance(x, np.ndarray) else f"{type(x).__name__} {x!r}"


def _extent(x: np.ndarray) -> tuple[int, int]:
    """Address and size in bytes of an array's memory."""
    begin, end = np.lib.array_utils.byte_bounds(x)
    return begin, end - begin


# ---- Compiling, with a cache

def cached(name: str, inputs: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The file `name` that make(path) writes, kept from run to run for as long as `inputs`, all that it is made from, stay the same."""
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:20]
    path = cache_folder() / f"{key}-{name}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            make(Path(folder) / name)
            os.replace(Path(folder) / name, path)      # at once: other processes may be making it as well
    return path


@functools.cache
def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"tinyllm-cuda-on-cpu-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def run_compiler(*arguments) -> str:
    """g++ with these arguments. Returns its output; raises CudaError with its messages."""
    if MISSING:
        raise CudaError(MISSING)
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise CudaError(f"g++ found errors:\n{done.stderr[-6000:]}")
    return done.stdout


@functools.cache
def compiler_version() -> str:
    return run_compiler("--version").splitlines()[0]


@functools.cache
def _machine() -> list[Path]:
    """The machine's object files."""
    headers = [(HERE / name).read_text(encoding="utf-8") for name in HEADERS]
    return [cached(Path(part).stem + ".o", ((HERE / part).read_text(encoding="utf-8"), *headers, *MACHINE, compiler_version()),
                   functools.partial(_compile_part, HERE / part)) for part in PARTS]


def _compile_part(source: Path, path: Path) -> None:
    run_compiler(*MACHINE, "-c", source, "-o", path)


def _compiled(code: str, options: tuple[str, ...]) -> Path:
    """The shared library of a source's kernels."""
    machine = _machine()
    inputs = (code, *[part.name for part in machine], *options, *KERNELS)
    return cached("kernels.so", inputs, lambda path: _compile(code, options, machine, path))


def _compile(code: str, options: tuple[str, ...], machine: list[Path], path: Path) -> None:
    source, preprocessed, unit = path.with_name("kernels.cu"), path.with_name("kernels.ii"), path.with_name("kernels.o")
    source.write_text(code, encoding="utf-8")
    text = run_compiler(*KERNELS, *options, "-E", "-x", "c++", "-include", HERE / "cuda_on_cpu.h", source)
    preprocessed.write_text(text + _entrances(text), encoding="utf-8")
    run_compiler(*KERNELS, "-c", "-x", "c++", "-fpreprocessed", preprocessed, "-o", unit)
    run_compiler("-shared", "-Wl,-Bsymbolic", unit, *machine, "-o", path)


def _entrances(text: str) -> str:
    """C++ that describes and calls each kernel of a preprocessed source: MACHINE_KERNEL of the header, for each."""
    made = []
    for match in re.finditer(r"__attribute__\(\(cuda_kernel, noinline\)\)(.*?)[{;]", text, re.DOTALL):
        bounds = re.search(r"cuda_launch_bounds\(\((.*?)\)\)\)\)(?!\))", match[1], re.DOTALL)
        plain = re.sub(r"__attribute__\s*\(\(cuda_launch_bounds\(\(.*?\)\)\)\)(?!\))", "", match[1], flags=re.DOTALL)
        name = re.search(r"(\w+)\s*\(", plain)[1]
        made.append(ENTRANCE.format(name=name, bounds=f"({bounds[1]})" if bounds else "0"))
    return "\n".join(made)


ENTRANCE = """
extern "C" {{
__attribute__((visibility("default"))) void describe_{name}(void (*word)(const char*, const char*)) {{ machine_describe({name}, word); }}
__attribute__((visibility("default"))) void call_{name}(void** arguments) {{ machine_call({name}, arguments); }}
__attribute__((visibility("default"))) extern const int bounds_{name} = {bounds};
}}
"""
