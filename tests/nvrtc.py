"""NVIDIA's compiler without a GPU, a driver or CuPy: does a kernel compile, and what does it take of the machine?

    python tests/nvrtc.py norms -DFORMAT=BF16          # kernels/cuda/norms.cu: registers, shared memory, spills

The library comes from the wheel nvidia-cuda-nvrtc (extra kernels-ci). The compiler's last step, ptxas, reports what each kernel takes.
"""
import ctypes
import functools
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_on_cpu import cached

from tinyllm.kernels.cuda import launch

ARCHITECTURES = ("sm_80", "sm_90")      # A100 and H100/H200: what the kernels are for
OPTIONS = (*launch.OPTIONS, "-ftz=true", "--device-as-default-execution-space")      # the last two CuPy adds


class CompileError(Exception):
    """The compiler's messages."""


@dataclass(frozen=True)
class Use:
    """What one kernel takes: registers a thread, bytes of static shared memory a block, bytes that a thread spills, and of its stack."""
    registers: int
    shared: int
    spills: int
    stack: int


def library_path() -> Path | None:
    """The NVRTC library of the wheel, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*"))), None)


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise CompileError("NVRTC is missing: pip install nvidia-cuda-nvrtc (in the extra kernels-ci)")
    return ctypes.CDLL(str(path))


def compile(source: str, options: Sequence[str] = (), architecture: str = "sm_90") -> dict[str, Use]:      # noqa: A001
    """Compile CUDA C to machine code. Returns what each kernel takes, by its name; raises CompileError.

    The report of what compiled once is kept from run to run.
    """
    flags = [*OPTIONS, *options, f"-arch={architecture}", "--ptxas-options=-v"]
    report = cached("report.txt", (source, *flags, _version()), lambda path: path.write_text(_log(source, flags), encoding="utf-8"))
    return _uses(report.read_text(encoding="utf-8"))


@functools.cache
def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value} {library_path()}"


def _log(source: str, flags: Sequence[str]) -> str:
    """What the compiler says."""
    nvrtc, program = _library(), ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None):
        raise CompileError("NVRTC cannot create a program")
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags]))
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise CompileError(log.value.decode())
    return log.value.decode()


def _uses(log: str) -> dict[str, Use]:
    """ptxas's report: "Compiling entry function 'name'", then a line on stack and spills, then "Used n registers, …, m bytes smem"."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        number = {what: int(match[1]) if (match := re.search(rf"(\d+) {text}", part)) else 0
                  for what, text in (("registers", "registers"), ("shared", "bytes smem"), ("stack", "bytes stack frame"),
                                     ("stores", "bytes spill stores"), ("loads", "bytes spill loads"))}
        found[part.split("'")[0]] = Use(number["registers"], number["shared"], number["stores"] + number["loads"], number["stack"])
    return found


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        raise SystemExit("usage: python tests/nvrtc.py FILE [-DNAME=VALUE ...]    FILE: a .cu file of tinyllm/kernels/cuda, without .cu")
    file, *options = arguments
    for architecture in ARCHITECTURES:
        for name, use in compile(launch.source(Path(file).stem), options, architecture).items():
            print(f"{architecture}  {name:32} {use.registers:4} registers  {use.shared:6} B shared  {use.spills:4} B spills"
                  f"  {use.stack:4} B stack")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CompileError as error:
        raise SystemExit(str(error)) from None
