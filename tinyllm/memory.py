"""Memory that was freed, kept for the next array: a training step asks for the same arrays again and again. And memory that is not there."""
import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, glibc's malloc.h
LARGE = 32 * 1024 * 1024  # the largest size that glibc will take from its heap instead of asking the system


class NotEnoughMemory(MemoryError):
    """A MemoryError whose message says what would be needed, and what to lower."""


class freed_memory_kept:
    """`with freed_memory_kept():` the C library does not give large freed blocks back to the system.

    Otherwise the system must find, clear and map fresh pages for every large array: 1,700 pages in a step of a model of 0.8 million
    parameters, 12,000 in one of 10 million, which was 11 % and 4 % of the time. Only for glibc (Linux); elsewhere it does nothing.
    """

    def __enter__(self):
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self.library = library if hasattr(library, "mallopt") else None
        if self.library:
            self.library.mallopt(MMAP_THRESHOLD, LARGE)
            self.library.mallopt(TRIM_THRESHOLD, 2**31 - 1)

    def __exit__(self, *exception):
        if self.library:
            self.library.mallopt(TRIM_THRESHOLD, 2 * LARGE)  # with LARGE, where glibc's own rule gets once it has freed a large array
            self.library.malloc_trim(0)
