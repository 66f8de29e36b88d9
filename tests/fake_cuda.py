"""The part of the fake device that is not arrays: what cupy.cuda has of streams, events, graphs, memory and properties.

Work on the device goes through `submit`: it is done at once, or, while a stream captures, noted for the graph that will do it. What
would make the host wait for the device goes through `synchronise`, which counts it, and refuses it where it is forbidden.
"""
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

synchronisations: list[str] = []  # what made the host wait, in order
launches: list[str] = []  # names of the kernels that were launched, or noted for a graph, in order
_forbidden: list[str] = []  # why, of each block that forbids them
_capturing: list["Stream"] = []  # at most one


def synchronise(what: str) -> None:
    """Count one wait of the host for the device. RuntimeError where it is forbidden or a stream captures, as on the device."""
    if _capturing:
        raise RuntimeError(f"{what} synchronises, which a capturing stream cannot")
    if _forbidden:
        raise RuntimeError(f"{what} synchronises with the device {_forbidden[-1]}")
    synchronisations.append(what)


@contextmanager
def forbidden(where: str = "where that is forbidden"):
    """Inside this block a synchronisation is an error."""
    _forbidden.append(where)
    try:
        yield
    finally:
        _forbidden.pop()


@contextmanager
def allowed():
    """Inside this block synchronisations are neither refused nor counted: for a test's own looking."""
    kept, count = _forbidden[:], len(synchronisations)
    _forbidden.clear()
    try:
        yield
    finally:
        _forbidden[:] = kept
        del synchronisations[count:]


def capturing() -> bool:
    """Whether work is being noted for a graph instead of done."""
    return bool(_capturing)


def submit(work) -> None:
    """Do work() now, or, while a stream captures, each time its graph is launched."""
    if _capturing:
        _capturing[-1].captured.append(work)
        return
    with np.errstate(all="ignore"):  # a GPU does not warn
        work()


# ---- streams, events, graphs ----


class Graph:
    """What a stream captured, to be done again by launch()."""

    def __init__(self, works):
        self.works, self.launches = works, 0

    def upload(self, stream=None) -> None:
        pass

    def launch(self, stream=None) -> None:
        self.launches += 1
        for work in self.works:
            submit(work)


class Event:
    """A place in a stream. Work is done at once, so every recorded event has passed."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.done, self.ptr = True, id(self)

    def record(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        synchronise("Event.synchronize()")


class Stream:
    """A queue of work; `with stream:` makes it the current one."""

    null: "Stream"
    _current: list["Stream"] = []

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr, self.captured = 0 if null else id(self), None

    def __enter__(self):
        Stream._current.append(self)
        return self

    def __exit__(self, *exception):
        Stream._current.pop()

    def use(self):
        Stream._current[:] = [self]
        return self

    def synchronize(self) -> None:
        synchronise("Stream.synchronize()")

    def record(self, event=None):
        return event or Event()

    def wait_event(self, event) -> None:
        pass

    @property
    def done(self) -> bool:
        return True

    def begin_capture(self, mode=None) -> None:
        if self is Stream.null:
            raise RuntimeError("the null stream cannot capture")
        if _capturing:
            raise RuntimeError("a stream captures already")
        self.captured = []
        _capturing.append(self)

    def end_capture(self) -> Graph:
        if _capturing != [self]:
            raise RuntimeError("the stream does not capture")
        _capturing.pop()
        works, self.captured = self.captured, None
        return Graph(works)

    def is_capturing(self) -> bool:
        return self in _capturing


Stream.null = Stream(null=True)


def get_current_stream() -> Stream:
    return Stream._current[-1] if Stream._current else Stream.null


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds; nothing here is worth timing."""
    return 1.0


# ---- memory ----


class OutOfMemoryError(MemoryError):
    """Like cupy.cuda.memory.OutOfMemoryError: a MemoryError, raised by the pool whose limit is reached."""

    def __init__(self, size, total, limit=0):
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes, limit set to: {limit:,} bytes).")
        self._size, self._total, self._limit = size, total, limit


class _Block:
    """Memory of one array: counted while the array lives."""

    __slots__ = ("pool", "size")

    def __init__(self, pool, size):
        self.pool, self.size = pool, size

    def __del__(self):
        self.pool._used -= self.size


class MemoryPool:
    """Counts bytes. As CuPy's pool does, it keeps what was freed (total_bytes) until free_all_blocks()."""

    def __init__(self, allocator=None):
        self._used = self._total = self._limit = 0

    def malloc(self, size: int):
        size = -(-size // 512) * 512  # CuPy's rounding
        if self._limit and self._used + size > self._limit:
            raise OutOfMemoryError(size, self._used, self._limit)
        self._used += size
        self._total = max(self._total, self._used)
        return _Block(self, size)

    def used_bytes(self) -> int:
        return self._used

    def free_bytes(self) -> int:
        return self._total - self._used

    def total_bytes(self) -> int:
        return self._total

    def free_all_blocks(self, stream=None) -> None:
        self._total = self._used

    def set_limit(self, size=None, fraction=None) -> None:
        self._limit = int(size if fraction is None else fraction * runtime.memGetInfo()[1])

    def get_limit(self) -> int:
        return self._limit


default_pool = MemoryPool()
_allocator = [default_pool.malloc]


def alloc(size: int):
    """Memory from the current allocator, or MemoryError."""
    return _allocator[-1](size)


def set_allocator(allocator=None) -> None:
    _allocator[:] = [allocator or default_pool.malloc]


def get_allocator():
    return _allocator[-1]


@contextmanager
def using_allocator(allocator=None):
    _allocator.append(allocator or default_pool.malloc)
    try:
        yield
    finally:
        _allocator.pop()


# ---- the device ----

PROPERTIES = {  # of an H200, as getDeviceProperties gives them
    "name": b"Fake H200", "major": 9, "minor": 0, "multiProcessorCount": 132, "totalGlobalMem": 150 * 10**9, "warpSize": 32,
    "sharedMemPerBlock": 48 * 1024, "sharedMemPerBlockOptin": 227 * 1024, "sharedMemPerMultiprocessor": 228 * 1024,
    "maxThreadsPerBlock": 1024, "regsPerBlock": 65536, "l2CacheSize": 60 * 2**20, "clockRate": 1980000, "memoryClockRate": 3201000,
    "memoryBusWidth": 6144,
}


class CUDARuntimeError(RuntimeError):
    """What the calls of cupy.cuda.runtime raise."""


class Device:
    """GPU number 0."""

    def __init__(self, device=None):
        self.id = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def use(self) -> None:
        pass

    def synchronize(self) -> None:
        synchronise("Device.synchronize()")

    @property
    def compute_capability(self) -> str:
        return f"{PROPERTIES['major']}{PROPERTIES['minor']}"

    @property
    def mem_info(self) -> tuple[int, int]:
        return runtime.memGetInfo()

    @property
    def attributes(self) -> dict[str, int]:
        return {"MultiProcessorCount": PROPERTIES["multiProcessorCount"], "MaxSharedMemoryPerBlockOptin": PROPERTIES["sharedMemPerBlockOptin"]}


runtime = SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError,
    getDeviceCount=lambda: 1,
    getDevice=lambda: 0,
    getDeviceProperties=lambda device: dict(PROPERTIES),
    memGetInfo=lambda: (PROPERTIES["totalGlobalMem"] - default_pool.total_bytes(), PROPERTIES["totalGlobalMem"]),
    runtimeGetVersion=lambda: 13000,
    driverGetVersion=lambda: 13000,
    deviceSynchronize=lambda: synchronise("runtime.deviceSynchronize()"),
    streamCaptureModeGlobal=0,
    streamCaptureModeThreadLocal=1,
    streamCaptureModeRelaxed=2,
)
nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError, MemoryPool=MemoryPool)
graph = SimpleNamespace(Graph=Graph)


def is_available() -> bool:
    return True
