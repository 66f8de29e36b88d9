"""`tinyllm doctor`: what it finds here is plausible, and what it advises follows from what it finds."""
import dataclasses
import sys
from pathlib import Path

import fake_cupy
import numpy as np
import pytest

import tinyllm
from tinyllm.bench import Facts, advice, machine
from tinyllm.bench.advice import RULES
from tinyllm.bench.gpu import Gpu, driver_version, gpu_facts
from tinyllm.cli import doctor
from tinyllm.cli.main import main
from tinyllm.kernels.cuda import cublaslt

H200 = Gpu("NVIDIA H200", "9.0", 140 * 2**30, 138 * 2**30, "580.65.06 (CUDA 13.0)", "14.2.0 (CUDA 13.0)", "13.0", "13.0.2", True)
WELL = Facts(
    python="CPython 3.12.1", numpy="2.4.0", system="Linux 6.1", cpu="A CPU", architecture="x86_64", vectors=("X86_V2", "X86_V3"),
    cores=8, affinity=8, usable=8, blas="scipy-openblas 0.3.31", blas_threads=8, memory=32 * 2**30, free=20 * 2**30, load=0.2,
    gpu="none", gpu_unused=False, kernels=True, peers={"torch": "2.13"}, variables={}, products=8e11, products_one=1.1e11, reading=4e10,
)  # fmt: skip
ILL = {
    "no fast library: take NumPy's own wheel": dict(blas="blas 3.9.0"),
    "cannot set the threads of mkl-sdl 2023": dict(blas="mkl-sdl 2023"),
    "no AVX2": dict(vectors=("X86_V2", "SSE42")),
    "tinyllm/kernels is not there": dict(kernels=False),
    "the control group allows 2 of 8 cores": dict(usable=2, products=2.1e11),
    "this process may use 4 of 8 cores": dict(affinity=4, usable=4),
    "OPENBLAS_NUM_THREADS=1: NumPy's own products get 1 of 8 cores": dict(variables={"OPENBLAS_NUM_THREADS": "1"}, blas_threads=1),
    "500 MiB of memory are free": dict(free=500 * 2**20),
    "other programs keep 6.0 of 8 cores busy": dict(load=6.0),
    "8 threads multiply only 2.0 times as fast as one": dict(products=2.2e11),
    "a GPU is there but not used": dict(gpu_unused=True),
    "the GPU cannot be used without cuBLASLt": dict(gpu=dataclasses.replace(H200, cublaslt="not found (…)", complete=False)),
}


def test_nothing_to_say_where_all_is_well():
    assert advice(WELL) == []
    for fine in (
        dict(architecture="arm64", vectors=("NEON",)),
        dict(free=None, memory=None, load=None),
        dict(blas="accelerate", usable=1, affinity=1, cores=1, products=1.1e11),
        dict(variables={"OMP_NUM_THREADS": "8"}),
        dict(vectors=("SSE42", "AVX2")),
        dict(gpu=H200),
    ):
        assert advice(dataclasses.replace(WELL, **fine)) == [], fine


@pytest.mark.parametrize("message", ILL)
def test_each_ill_has_its_remedy(message):
    [said] = advice(dataclasses.replace(WELL, **ILL[message]))
    assert message in said and "\n" not in said


def test_every_rule_is_tested():
    assert all(any(rule(dataclasses.replace(WELL, **ill)) for ill in ILL.values()) for rule in RULES)


def test_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "facts", lambda: WELL)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines()[:11]]
    assert names == "python cpu cores blas memory gpu cuda kernels peers products reading".split()
    for text in (
        "NumPy 2.4.0", "A CPU (x86_64); vectors: X86_V2 X86_V3", "32.0 GiB in all, 20.0 GiB free", "torch 2.13",
        "800 GFLOP/s in fp32 on 8 threads, 110 on one", "40.0 GB/s",
    ):  # fmt: skip
        assert text in out
    assert out.endswith("\n\nnothing to change\n")
    monkeypatch.setattr(doctor, "facts", lambda: dataclasses.replace(WELL, memory=None, free=None, peers={}, vectors=(), gpu_unused=True))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "unknown in all, unknown free" in out and "vectors: unknown" in out and "nobody to time" in out
    assert out.rstrip().splitlines()[-3] == "to change:" and out.count("\n  - ") == 2


def test_a_gpu_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "facts", lambda: dataclasses.replace(WELL, gpu=H200))
    assert main(["doctor"]) == 0
    _, _, _, _, _, gpu, cuda, *_ = capsys.readouterr().out.splitlines()
    assert gpu == "gpu       NVIDIA H200, compute capability 9.0; 140.0 GiB in all, 138.0 GiB free"
    assert cuda == "cuda      driver 580.65.06 (CUDA 13.0), CuPy 14.2.0 (CUDA 13.0), NVRTC 13.0, cuBLASLt 13.0.2"


def test_what_a_gpu_says_of_itself(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    found = gpu_facts()
    assert (found.name, found.capability, found.nvrtc) == ("Fake H200", "9.0", "13.0") and "14.2.0 (CUDA 13.0)" in str(found)
    assert found.free <= found.memory == 150 * 10**9
    assert machine.graphics() == (found, False)

    def missing():
        raise OSError("--device cuda needs the library cuBLASLt:\n pip install")

    monkeypatch.setattr(cublaslt, "library", missing)
    found = gpu_facts()
    assert found.cublaslt == "not found (--device cuda needs the library cuBLASLt: pip install)" and not found.complete
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  gcc version 13.3.0\n")
    assert driver_version(version) == "580.65.06" and driver_version(tmp_path / "none") == ""


def test_the_facts_of_this_machine():
    before = tinyllm.threads()
    found = machine.facts(seconds=0.001)
    assert tinyllm.threads() == before
    assert found.numpy == np.__version__ and found.python.endswith(sys.version.split()[0]) and found.cpu and found.system
    assert 1 <= found.usable <= found.affinity <= found.cores and found.blas_threads >= 1 and found.vectors
    assert 1e8 < found.products < 1e15 and 1e8 < found.products_one < 1e15 and 1e8 < found.reading < 1e13
    if found.free is not None:
        assert 0 < found.free <= found.memory
    assert found.kernels == Path(tinyllm.__file__).with_name("kernels").is_dir() and all(isinstance(line, str) for line in advice(found))


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="control groups are Linux's")
def test_cached_files_count_as_free_memory(tmp_path):
    for name, content in {"max": "1000000", "current": "900000", "stat": "anon 100000\ninactive_file 700000\nactive_file 100000"}.items():
        (tmp_path / f"memory.{name}").write_text(content + "\n")
    assert machine.memory(tmp_path) == (1_000_000, 800_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(tmp_path) == machine.memory(tmp_path / "nowhere") > (1_000_000, 800_000)


def test_doctor_takes_no_arguments(capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--fast"])
    assert stopped.value.code == 2 and capfd.readouterr().err == "tinyllm: error: unknown option --fast (see tinyllm doctor --help)\n"
