"""Freed memory is kept inside the block, given back after it, and the C library then works as it usually does."""
import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT

from tinyllm import memory
from tinyllm.memory import freed_memory_kept

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
COUNT = """
import resource
import numpy as np
from tinyllm.memory import freed_memory_kept

def faults(megabytes=4):
    "Pages that the system had to find while arrays of this size were made and freed, after the first."
    length, before = megabytes * 2**20, 0
    for n in range(12):
        if n == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(length, np.uint8) + np.ones(length, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
"""


def run(code: str) -> None:
    """In a process of its own: what the C library has once been told, it does not forget."""
    done = subprocess.run([sys.executable, "-c", COUNT + code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_arrays_take_the_place_of_freed_ones():
    run("""
with freed_memory_kept():
    assert faults(4) < 100 and faults(24) < 100, (faults(4), faults(24))   # of 10 · 3 · 1024 pages, and of six times as many
""")


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_afterwards_memory_is_given_back_and_arrays_are_quick():
    run("""
before = resident()
with freed_memory_kept():
    many = [np.ones(2**20) for _ in range(12)]     # 8 MB each, all from the heap
    last = np.ones(1000)                           # above them
    del many
    assert resident() > before + 60, (before, resident())
assert resident() < before + 30, (before, resident())
assert faults(1) < 100 and faults(8) < 100, (faults(1), faults(8))
""")


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_an_error_inside_ends_it_too(monkeypatch):
    told = []

    class Library:
        def mallopt(self, what, value):
            told.append((what, value))

        def malloc_trim(self, pad):
            told.append("trim")

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library())
    with pytest.raises(KeyError), freed_memory_kept():
        inside = len(told)
        raise KeyError
    assert inside == 2 and told[-1] == "trim" and told[-2] == (memory.TRIM_THRESHOLD, 2 * memory.LARGE)


def test_another_system_or_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # musl: no mallopt
    with freed_memory_kept() as nothing:
        assert nothing is None

    def missing(name):
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    monkeypatch.setattr(memory.sys, "platform", "win32")
    with freed_memory_kept():
        pass


def test_the_numbers_are_those_of_malloc_h():
    header = Path("/usr/include/malloc.h")
    if not header.exists():
        pytest.skip("no C headers here")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define M_")]
    values = {words[1]: int(words[2].strip("()")) for words in lines if len(words) > 2 and words[2].strip("()").lstrip("-").isdecimal()}
    assert (values["M_TRIM_THRESHOLD"], values["M_MMAP_THRESHOLD"]) == (memory.TRIM_THRESHOLD, memory.MMAP_THRESHOLD)
